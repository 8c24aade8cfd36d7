"""`popalign gc`: who is chosen, what is said, and that the registry's models stay."""

import os
import time

import pytest

from popalign_core.errors import UnknownName
from storage.artifacts import ArtifactRef, is_committed, require_present
from storage.commit import staged_artifact
from storage.errors import RemovedArtifact
from storage.layout import Workspace
from storage.locks import run_lock
from storage.registry import model_entry, set_current
from storage.retention import Choice
from storage.tables import read_artifact, read_rows, write_rows
from tasks.classification import classify_shard
from tasks.retention import collect_garbage, gc_choice

DAY = 86400
WHOLE = Choice(30, frozenset({"hold", "promote", "none"}), frozenset({"images", "weights", "checkpoints"}))


def commit_model(run, model_id: str) -> ArtifactRef:
    ref = ArtifactRef(run.workspace, run.run_id, "models", model_id)
    row = {"run_id": run.run_id, "model_id": model_id, "objective": "popalign", "adapter": "full", "round": 1}
    row |= {"seed": 0, "steps": 1, "beta": 1.0}
    with staged_artifact(ref) as folder:
        write_rows(folder, "models", [row])
        (folder / "unet").mkdir()
        (folder / "unet" / "weights.safetensors").write_bytes(bytes(2_000_000))
    return ref


def hold(run, model_id: str) -> None:
    row = {
        "run_id": run.run_id,
        "base_model_id": "base",
        "model_id": model_id,
        "verdict": "hold",
        "reason": "",
        "checks": [],
    }
    with staged_artifact(ArtifactRef(run.workspace, run.run_id, "decisions", model_id)) as folder:
        write_rows(folder, "decisions", [row])


def make_old(run, days: float = 45) -> None:
    then = time.time() - days * DAY
    for manifest in Workspace.open(run.workspace).run_folder(run.run_id).glob("*/*/manifest.json"):
        os.utime(manifest, (then, then))


def test_a_list_names_run_decision_age_and_bytes_and_what_removes_them(written_run) -> None:
    written_run.commit_samples("base", "validation")
    commit_model(written_run, "round-1")
    commit_model(written_run, "round-2")
    hold(written_run, "round-2")
    make_old(written_run)
    images = next(Workspace.open(written_run.workspace).run_folder("written").glob("samples/*/images.parquet"))

    listed = collect_garbage(written_run.workspace, gc_choice(30, [], []), yes=False)
    size = f"{images.stat().st_size / 1e6:.2f} MB"
    assert listed.rows == (
        ("written", "hold", "45.0 days", "images of 1 shard", size),
        ("written", "hold", "45.0 days", "weights of 2 models", "4.00 MB"),
    )
    assert listed.bytes == images.stat().st_size + 4_000_000
    assert listed.conclusion == f"nothing was touched: the same with --yes removes these {listed.total}"
    assert images.is_file()

    removed = collect_garbage(written_run.workspace, gc_choice(30, [], []), yes=True)
    assert (removed.rows, removed.bytes) == (listed.rows, listed.bytes)
    assert not images.exists()
    assert len(read_rows(Workspace.open(written_run.workspace), "written", "samples")) == 2 * 8
    again = collect_garbage(written_run.workspace, gc_choice(30, [], []), yes=True)
    assert again.rows == ()
    assert "nothing to remove" in again.conclusion


def test_the_models_of_the_registry_stay_the_current_one_and_those_before_it(written_run) -> None:
    """Also held ones that were promoted by force."""
    place = Workspace.open(written_run.workspace)
    refs = {name: commit_model(written_run, name) for name in ("round-1", "round-2", "round-3")}
    hold(written_run, "round-3")
    for name in ("round-1", "round-2"):
        set_current(place, model_entry(place, "written", name), by="test", reason="test", forced=True)
    make_old(written_run)
    assert collect_garbage(written_run.workspace, WHOLE, yes=True).bytes == 2_000_000
    for name in ("round-1", "round-2"):
        require_present(refs[name], "unet")
        assert (refs[name].folder / "unet" / "weights.safetensors").is_file()
    with pytest.raises(RemovedArtifact, match="unet of models/round-3"):
        require_present(refs["round-3"], "unet")
    with pytest.raises(RemovedArtifact):
        model_entry(place, "written", "round-3")


def test_work_on_removed_images_is_refused_by_name(written_run) -> None:
    samples = written_run.commit_samples("base", "validation")
    make_old(written_run)
    collect_garbage(written_run.workspace, WHOLE, yes=True)
    assert is_committed(samples)
    assert len(read_artifact(samples, "samples")) == 16
    labels = ArtifactRef(samples.workspace, samples.run_id, "attributes", f"{samples.key}.builder")
    with pytest.raises(RemovedArtifact, match=r"images\.parquet of samples/base\.validation\.00000 of run written was"):
        classify_shard.fn(labels, written_run.config)


def test_a_run_in_use_is_told(written_run) -> None:
    samples = written_run.commit_samples("base", "validation")
    make_old(written_run)
    with run_lock(Workspace.open(written_run.workspace), "written"):
        found = collect_garbage(written_run.workspace, WHOLE, yes=True)
    assert found.rows == ()
    (problem,) = found.problems
    assert problem.startswith("written stays as it is: run 'written' in")
    assert (samples.folder / "images.parquet").is_file()


@pytest.mark.parametrize(
    ("decisions", "what", "expected"),
    [
        ([], [], Choice(30, frozenset({"hold", "none"}), None)),
        (["any"], ["images"], Choice(30, frozenset({"hold", "promote", "none"}), frozenset({"images"}))),
        (["promote"], ["weights", "images"], Choice(30, frozenset({"promote"}), frozenset({"weights", "images"}))),
    ],
)
def test_a_command_line_is_a_choice(decisions, what, expected) -> None:
    assert gc_choice(30, decisions, what) == expected


@pytest.mark.parametrize(("decisions", "what", "name"), [(["held"], [], "held"), ([], ["tables"], "tables")])
def test_another_name_is_refused(decisions, what, name) -> None:
    with pytest.raises(UnknownName, match=f"unknown --.* '{name}'. Known: "):
        gc_choice(30, decisions, what)
