"""The pointer to the current model: every move is kept, whole after a kill and with several hands at it."""

import json
import signal
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import REMOVED, ArtifactRef, Tombstone, read_manifest
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import (
    ConflictingArtifact,
    CorruptArtifact,
    FolderInUse,
    NotCommitted,
    NothingToRollBack,
    RemovedArtifact,
    WorkspaceTooNew,
)
from storage.folders import staged_folder
from storage.layout import Workspace
from storage.registry import (
    REGISTRY,
    Move,
    Registry,
    current_model,
    model_entry,
    protected_models,
    read_registry,
    require_weights,
    roll_back,
    set_current,
)
from storage.tables import write_rows

PROMOTE = """
import os, signal, sys
import storage.disk
from storage.layout import Workspace
from storage.registry import model_entry, set_current
workspace = Workspace.open(sys.argv[1])
if sys.argv[3:] == ["die"]:
    storage.disk.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
moves = 0
for run_id in sys.argv[2].split(","):
    entry = model_entry(workspace, run_id, "round-1")
    moves += set_current(workspace, entry, by="test", reason="night " + run_id) is not None
print(moves)
"""
WHO = {"by": "test", "reason": "because"}


def commit_model(workspace: Workspace, run_id: str, adapter: str = "lora", weights: bytes = b"weights") -> ArtifactRef:
    ref = ArtifactRef(str(workspace.root), run_id, "models", "round-1")
    row = {"run_id": run_id, "model_id": "round-1", "objective": "sft", "adapter": adapter, "round": 1, "seed": 1}
    with staged_artifact(ref) as folder:
        write_rows(folder, "models", [row | {"steps": 1, "beta": 1.0, "base_model": "emoji"}])
        part = folder / ("lora" if adapter == "lora" else "unet")
        part.mkdir()
        (part / "weights.safetensors").write_bytes(weights)
    return ref


@pytest.fixture
def models(workspace: Workspace) -> Workspace:
    """Three runs with a model each."""
    for run_id in ("one", "two", "three"):
        commit_model(workspace, run_id)
    return workspace


def promote(workspace: Workspace, run_id: str) -> Move | None:
    return set_current(workspace, model_entry(workspace, run_id, "round-1"), **WHO)


def current(workspace: Workspace) -> str | None:
    entry = current_model(workspace)
    return entry.run_id if entry else None


def test_a_workspace_without_a_registry_has_the_base(workspace):
    assert read_registry(workspace) == Registry(None, ())
    assert protected_models(workspace) == set()
    with pytest.raises(NothingToRollBack, match="nothing is promoted"):
        roll_back(workspace, by="test")


def test_back_goes_the_way_that_was_come(models):
    promote(models, "one")
    promote(models, "two")
    assert current(models) == "two"
    assert roll_back(models, **WHO).after.run_id == "one"
    promote(models, "three")
    assert roll_back(models, **WHO).after.run_id == "one", "two was left before"
    assert roll_back(models, **WHO).after is None
    with pytest.raises(NothingToRollBack):
        roll_back(models, **WHO)
    history = read_registry(models).history
    assert [move.action for move in history] == ["promote", "promote", "rollback", "promote", "rollback", "rollback"]
    assert protected_models(models) == {("one", "round-1"), ("two", "round-1"), ("three", "round-1")}


def test_moving_to_where_it_is_changes_no_byte(models):
    promote(models, "one")
    path = models.root / REGISTRY
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert promote(models, "one") is None
    assert roll_back(models, to="one", by="somebody") is None
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    roll_back(models, **WHO)
    assert roll_back(models, to="base", **WHO) is None


def test_back_to_a_named_run(models):
    for run_id in ("one", "two", "three"):
        promote(models, run_id)
    with pytest.raises(NothingToRollBack, match=r"'four' is not among .* these are: two, one, base"):
        roll_back(models, to="four", **WHO)
    assert roll_back(models, to="one", **WHO).after.run_id == "one"
    with pytest.raises(NothingToRollBack, match="these are: base"):
        roll_back(models, to="two", **WHO)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three", "back", "base"]), max_size=12))
def test_any_moves_are_a_chain_and_back_undoes_them(tmp_path_factory, moves):
    workspace = Workspace.open(tmp_path_factory.mktemp("moves"))
    for run_id in ("one", "two", "three"):
        commit_model(workspace, run_id)
    line = [None]
    for move in moves:
        if move == "base":
            roll_back(workspace, to="base", **WHO)
            line = [None]
        elif move == "back":
            if len(line) > 1:
                line.pop()
                roll_back(workspace, **WHO)
        elif line[-1] != move:
            line.append(move)
            promote(workspace, move)
        assert current(workspace) == line[-1]
    history = read_registry(workspace).history
    assert [move.before for move in history[1:]] == [move.after for move in history[:-1]]
    assert protected_models(workspace) == {(name, "round-1") for name in set(moves) - {"back", "base"}}


@pytest.mark.parametrize("kill", ["draft", "after_stage", "after_commit"])
def test_a_kill_leaves_the_old_model_or_the_new_one(models, child, kill):
    promote(models, "one")
    dies = ["die"] if kill == "draft" else []
    variables = {} if kill == "draft" else {"POPALIGN_KILL_AT": f"{kill}:registry"}
    process = child(PROMOTE, str(models.root), "two", *dies, **variables)
    _, stderr = process.communicate()
    assert process.returncode == -signal.SIGKILL, stderr
    assert current(models) == ("two" if kill == "after_commit" else "one")
    assert len(list(models.root.glob(f".{REGISTRY}~*"))) == (kill == "draft")
    promote(models, "three")
    assert current(models) == "three"
    assert list(models.root.glob(f".{REGISTRY}~*")) == []


def test_of_promoters_at_once_none_is_lost(models, child):
    orders = [",".join(order * 10) for order in (("one", "two"), ("two", "three"), ("three", "one"))]
    made = 0
    for process in [child(PROMOTE, str(models.root), order) for order in orders]:
        moves, stderr = process.communicate()
        assert process.returncode == 0, stderr
        made += int(moves)
    registry = read_registry(models)
    assert len(registry.history) == made
    assert [None, *(move.after for move in registry.history)] == [
        *(move.before for move in registry.history),
        registry.current,
    ]
    assert all(move.before != move.after for move in registry.history)
    assert all(move.reason == f"night {move.after.run_id}" for move in registry.history)


def test_weights_that_went_are_refused_by_name(models):
    promote(models, "one")
    promote(models, "two")
    entry = current_model(models)
    ref = entry.reference(models)
    files = {name: found for name, found in read_manifest(ref).files.items() if name.startswith("lora/")}
    (ref.folder / REMOVED).write_text(Tombstone(files, "2026-01-01T00:00:00", "older than 30 days").to_json())
    (entry.weights(models) / "weights.safetensors").unlink()
    with pytest.raises(RemovedArtifact, match=r"removed by `popalign gc`"):
        promote(models, "two")
    (models.run_folder("one") / "models" / "round-1" / "lora" / "weights.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match="round-1 of run 'one' are missing"):
        roll_back(models, **WHO)
    assert current(models) == "two"
    assert roll_back(models, to="base", **WHO).after is None
    with pytest.raises(NotCommitted, match=r"run four in .* has no committed models"):
        promote(models, "four")


def test_a_model_written_anew_is_another_one(models):
    promote(models, "one")
    entry = current_model(models)
    commit = models.run_folder("one") / "models" / "round-1"
    commit.rename(models.root / "elsewhere")
    commit_model(models, "one", weights=b"other")
    with pytest.raises(ConflictingArtifact, match="written anew since it was promoted"):
        require_weights(models, entry)
    assert promote(models, "one").before == entry


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "current": {"run": 1}, "history": []}']
)
def test_a_damaged_registry_is_refused_by_name(workspace, text):
    (workspace.root / REGISTRY).write_text(text)
    with pytest.raises(CorruptArtifact, match=r"registry\.json is not a model registry"):
        current_model(workspace)


def test_a_newer_registry_is_refused(workspace):
    (workspace.root / REGISTRY).write_text('{"version": 2}')
    with pytest.raises(WorkspaceTooNew, match="version 2; this program knows up to 1"):
        current_model(workspace)


def comparison(axis: str, measure: str = "l2", split: str = "eval") -> dict[str, object]:
    names = ("before", "after", "difference", "difference_low", "difference_high", "ratio", "ratio_low", "ratio_high")
    numbers = dict(zip(names, (0.8, 0.2, -0.6, -0.7, -0.5, 0.25, 0.2, 0.3), strict=True))
    named = {"run_id": "one", "base_model_id": "base", "model_id": "round-1", "judge_id": "judge", "split": split}
    return named | {"axis": axis, "measure": measure} | numbers


def test_the_view_shows_decisions_disparities_and_the_pointer(models, tmp_path, monkeypatch):
    with staged_artifact(ArtifactRef(str(models.root), "one", "disparities", "round-1")) as folder:
        rows = [comparison("b"), comparison("a"), comparison("a", "obedience"), comparison("a", split="train")]
        write_rows(folder, "comparisons", rows)
    row = {"run_id": "one", "base_model_id": "base", "model_id": "round-1", "verdict": "hold", "reason": "why"}
    with staged_artifact(ArtifactRef(str(models.root), "one", "decisions", "round-1")) as folder:
        write_rows(folder, "decisions", [row | {"checks": []}])
    promote(models, "one")
    promote(models, "two")
    rebuild_catalog(models)
    found = {row["run_id"]: row for row in query(models, "FROM model_registry").to_pylist()}
    assert {run_id: row["promoted"] for run_id, row in found.items()} == {"one": False, "two": True, "three": False}
    assert (found["one"]["verdict"], found["one"]["reason"], found["one"]["base_model"]) == ("hold", "why", "emoji")
    assert found["two"]["verdict"] is None
    assert found["two"]["disparities"] is None
    numbers = {"before": 0.8, "after": 0.2, "ratio": 0.25, "ratio_low": 0.2, "ratio_high": 0.3}
    assert found["one"]["disparities"] == [{"axis": "a"} | numbers, {"axis": "b"} | numbers]
    # Any client, from any folder, under any name; and the pointer is read when the view is.
    roll_back(models, **WHO)
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{models.catalog}' AS other (READ_ONLY)")
        sql = "SELECT run_id FROM other.model_registry WHERE promoted"
        assert connection.execute(sql).fetchall() == [("one",)]
        (models.root / REGISTRY).write_text("{")
        assert connection.execute(sql).fetchall() == []


def test_the_view_of_an_empty_workspace_is_empty_and_says_what_it_is(workspace):
    assert query(workspace, "FROM model_registry").num_rows == 0
    found = query(workspace, "SELECT comment FROM duckdb_columns() WHERE table_name = 'model_registry'").to_pylist()
    assert len(found) == 15
    assert all(row["comment"] for row in found)


def test_a_staged_folder_is_whole_or_not_there(tmp_path: Path, child):
    target = tmp_path / "new" / "export"
    with pytest.raises(FileExistsError), staged_folder(target) as folder:  # noqa: PT012
        (folder / "half").touch(exist_ok=False)
        (folder / "half").touch(exist_ok=False)
    assert list(target.parent.iterdir()) == []
    code = "import os, sys; from pathlib import Path; from storage.folders import staged_folder\n"
    code += "with staged_folder(Path(sys.argv[1])) as f: (f / 'half').touch(); os.kill(os.getpid(), 9)"
    killed = child(code, str(target))
    assert killed.wait() == -signal.SIGKILL
    assert not target.exists()
    target.mkdir()
    with staged_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "whole").write_text("text")
    assert [path.name for path in target.parent.iterdir()] == ["export"]
    assert (target / "part" / "whole").read_text() == "text"
    with pytest.raises(FolderInUse, match="export is there already"), staged_folder(target):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(FolderInUse), staged_folder(tmp_path / "file"):
        pass


def test_what_the_file_holds(models):
    set_current(models, model_entry(models, "one", "round-1"), by="ann@host", reason="it was reviewed", forced=True)
    values = json.loads((models.root / REGISTRY).read_text())
    assert values["current"] == values["history"][0]["after"]
    assert values["current"] | {"digest": ""} == {
        "run_id": "one",
        "model_id": "round-1",
        "adapter": "lora",
        "digest": "",
    }
    (move,) = values["history"]
    assert (move["by"], move["reason"], move["forced"], move["before"]) == ("ann@host", "it was reviewed", True, None)
    assert move["at"].endswith("+00:00")
