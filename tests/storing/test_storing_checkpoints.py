"""Checkpoints: the last complete one is found, whatever happened while the next was written."""

from pathlib import Path

import pytest

from storage.artifacts import committed_keys
from storage.checkpoints import drop_latest, keep_latest, latest_checkpoint, remove_checkpoints, staged_checkpoint
from storage.layout import Workspace


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "workspace")


def save(place: Workspace, step: int, *, fail: bool = False) -> None:
    with staged_checkpoint(place, "night", "round-1", step) as folder:
        (folder / "state.json").write_text(str(step))
        if fail:
            raise RuntimeError


def test_there_is_none_before_the_first(place: Workspace) -> None:
    assert latest_checkpoint(place, "night", "round-1") is None


def test_the_latest_replaces_the_earlier_one_once_it_is_said_to_be_sound(place: Workspace) -> None:
    for step in (9, 10):
        save(place, step)
    folder = latest_checkpoint(place, "night", "round-1")
    assert folder is not None
    assert (folder / "state.json").read_text() == "10"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["10", "9"]
    keep_latest(place, "night", "round-1")
    assert [path.name for path in folder.parent.iterdir()] == ["10"]


def test_a_checkpoint_that_is_not_sound_gives_way_to_the_one_before(place: Workspace) -> None:
    for step in (9, 10):
        save(place, step)
    drop_latest(place, "night", "round-1")
    folder = latest_checkpoint(place, "night", "round-1")
    assert folder is not None
    assert (folder / "state.json").read_text() == "9"
    drop_latest(place, "night", "round-1")
    assert latest_checkpoint(place, "night", "round-1") is None
    drop_latest(place, "night", "round-1")


def test_an_error_while_saving_keeps_the_earlier_one(place: Workspace) -> None:
    save(place, 50)
    with pytest.raises(RuntimeError):
        save(place, 100, fail=True)
    folder = latest_checkpoint(place, "night", "round-1")
    assert folder is not None
    assert (folder / "state.json").read_text() == "50"


def test_what_a_crash_left_half_written_is_neither_read_nor_kept(place: Workspace) -> None:
    save(place, 50)
    folder = latest_checkpoint(place, "night", "round-1")
    assert folder is not None
    (folder.parent / "~left").mkdir()
    assert latest_checkpoint(place, "night", "round-1") == folder
    save(place, 100)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["100", "50"]


def test_names_do_not_share_checkpoints_and_removal_is_complete(place: Workspace) -> None:
    save(place, 50)
    assert latest_checkpoint(place, "night", "round-2") is None
    remove_checkpoints(place, "night", "round-1")
    assert latest_checkpoint(place, "night", "round-1") is None


def test_a_checkpoint_is_no_committed_data(place: Workspace) -> None:
    save(place, 50)
    assert committed_keys(place, "night", "models") == []
    assert committed_keys(place, "night", "checkpoints") == []
