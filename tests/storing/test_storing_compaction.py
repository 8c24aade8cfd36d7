"""Copies that queries read: the same rows, each once, whatever was added, removed or interrupted since."""

import os
import time

import duckdb
import pytest

from storage import compaction
from storage.artifacts import ArtifactRef
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.compaction import FEWEST_FILES, FOLDER_NAME, MOST_SEGMENTS, compact, current_segments, remove_compacted
from storage.layout import Workspace
from storage.tables import write_rows

TOTALS = "SELECT run_id, count(*) AS n, sum(seconds) AS seconds FROM timings GROUP BY ALL ORDER BY ALL"


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "YOUNGEST_NS", 0)


@pytest.fixture
def commit(workspace: Workspace, timing):
    def commit(run_id: str, key: str) -> None:
        with staged_artifact(ArtifactRef(str(workspace.root), run_id, "timings", key)) as folder:
            write_rows(folder, "timings", [timing(seconds=1.0) | {"run_id": run_id}] * 2)

    return commit


@pytest.fixture
def night(workspace: Workspace, commit):
    """A decided run with so many shards."""

    def night(run_id: str, shards: int = FEWEST_FILES) -> None:
        for shard in range(shards):
            commit(run_id, f"shard-{shard}")
        decision = {"run_id": run_id, "base_model_id": "base", "model_id": "m", "verdict": "hold", "reason": "r"}
        with staged_artifact(ArtifactRef(str(workspace.root), run_id, "decisions", "all")) as folder:
            write_rows(folder, "decisions", [decision | {"checks": []}])

    return night


def totals(workspace: Workspace) -> dict[str, int]:
    rebuild_catalog(workspace)
    return {row["run_id"]: row["n"] for row in query(workspace, TOTALS).to_pylist()}


def files_read(workspace: Workspace) -> int:
    with duckdb.connect(workspace.catalog, read_only=True) as connection:
        (sql,) = connection.execute("SELECT sql FROM duckdb_views() WHERE view_name = 'timings'").fetchone() or ("",)
    return str(sql).count(".parquet'")


def test_a_copy_has_the_same_rows_in_one_file(workspace, night):
    night("night-1")
    night("night-2")
    before = totals(workspace)
    assert files_read(workspace) == 2 * FEWEST_FILES
    (segment,) = compact(workspace)
    assert segment.sources.keys() == {"night-1", "night-2"}
    assert totals(workspace) == before == {"night-1": 2 * FEWEST_FILES, "night-2": 2 * FEWEST_FILES}
    assert files_read(workspace) == 1
    assert compact(workspace) == [segment]  # nothing to do


def test_what_is_committed_later_is_seen_once(workspace, night, commit):
    night("night-1")
    night("night-2")
    compact(workspace)
    commit("night-2", "late")
    assert totals(workspace) == {"night-1": 2 * FEWEST_FILES, "night-2": 2 * FEWEST_FILES + 2}
    compact(workspace)
    assert totals(workspace) == {"night-1": 2 * FEWEST_FILES, "night-2": 2 * FEWEST_FILES + 2}
    assert files_read(workspace) == 1


def test_a_run_that_is_removed_is_gone(workspace, night):
    night("night-1")
    night("night-2")
    compact(workspace)
    os.rename(workspace.run_folder("night-1"), workspace.root / "elsewhere")
    assert totals(workspace) == {"night-2": 2 * FEWEST_FILES}


def test_a_run_that_still_works_is_not_copied(workspace, night, commit):
    night("night-1")
    for shard in range(FEWEST_FILES):
        commit("working", f"shard-{shard}")
    (segment,) = compact(workspace)
    assert segment.sources.keys() == {"night-1"}


def test_a_folder_without_a_manifest_keeps_its_run_out(workspace, night):
    """Its manifest comes later, and the folder around it would look unchanged."""
    night("night-1")
    half = workspace.run_folder("night-1") / "timings" / "half"
    half.mkdir()
    assert compact(workspace) == []
    half.rmdir()
    assert len(compact(workspace)) == 1


def test_a_change_of_a_moment_ago_is_not_trusted(workspace, night, monkeypatch):
    monkeypatch.setattr(compaction, "YOUNGEST_NS", 3_600_000_000_000)
    night("night-1")
    assert compact(workspace) == []


def test_many_segments_become_one_and_old_ones_stay_for_open_catalogs(workspace, night, monkeypatch):
    for number in range(MOST_SEGMENTS + 1):
        night(f"night-{number}")
        segments = compact(workspace)
    assert len(segments) == 1
    assert totals(workspace) == {f"night-{number}": 2 * FEWEST_FILES for number in range(MOST_SEGMENTS + 1)}
    kept = len(list((workspace.root / FOLDER_NAME).glob("timings.*.parquet")))
    assert kept == MOST_SEGMENTS + 1
    later = time.time() + 2 * compaction.GRACE_SECONDS
    monkeypatch.setattr(compaction.time, "time", lambda: later)
    compact(workspace)
    assert len(list((workspace.root / FOLDER_NAME).glob("timings.*.parquet"))) == 1


@pytest.mark.parametrize("damage", ["index", "segment", "all"])
def test_a_copy_that_is_lost_costs_nothing(workspace, night, damage):
    night("night-1")
    (segment,) = compact(workspace)
    folder = workspace.root / FOLDER_NAME
    if damage == "index":
        (folder / "index.json").write_text("{")
    elif damage == "segment":
        (folder / segment.name).unlink()
    else:
        remove_compacted(workspace)
    assert current_segments(workspace) == []
    assert totals(workspace) == {"night-1": 2 * FEWEST_FILES}


def test_another_version_of_a_table_is_copied_anew(workspace, night, monkeypatch):
    night("night-1")
    compact(workspace)
    monkeypatch.setitem(compaction.VERSIONS, "timings", 99)
    assert current_segments(workspace) == []
