"""SIGKILL at every named point of the commit: the next run goes on and ends with the same bytes."""

import signal

import pytest

from storage.artifacts import ArtifactRef, artifact_digest, committed_keys, is_committed
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.layout import STAGING, Workspace
from storage.tables import read_table, write_rows

# Needs no pyarrow, and so starts quickly.
WRITE_SHARDS = """
import shutil, sys
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
for shard in range(3):
    ref = ArtifactRef(sys.argv[1], "night-1", "timings", f"shard-{shard}")
    if not is_committed(ref):
        with staged_artifact(ref) as folder:
            shutil.copy(f"{sys.argv[2]}/{shard}/timings.parquet", folder)
"""
POINTS = ("after_stage", "before_rename", "before_manifest", "after_commit")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        (folder / str(shard)).mkdir()
        write_rows(folder / str(shard), "timings", rows_of(shard))
    return folder


def rows_of(shard):
    row = {"run_id": "night-1", "stage": "sampling", "key": str(shard), "seconds": 1.0}
    return [row | {"items": 1, "device": "cpu"}]


def references(workspace):
    return [ArtifactRef(str(workspace.root), "night-1", "timings", f"shard-{shard}") for shard in range(3)]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_goes_on(tmp_path, shards, child, point, nth):
    workspace = Workspace.open(tmp_path)
    refs = references(workspace)
    killed = child(WRITE_SHARDS, str(tmp_path), str(shards), POPALIGN_KILL_AT=f"{point}:timings:{nth}")
    _, stderr = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, stderr

    finished = nth if point == "after_commit" else nth - 1
    assert refs[nth - 1].folder.exists() == (point in ("before_manifest", "after_commit"))
    assert [is_committed(ref) for ref in refs] == [shard < finished for shard in range(3)]
    assert read_table(workspace, "night-1", "timings")["key"].to_pylist() == [str(shard) for shard in range(finished)]
    rebuild_catalog(workspace)
    assert query(workspace, "SELECT count(*) AS n FROM timings").to_pylist() == [{"n": finished}]

    again = child(WRITE_SHARDS, str(tmp_path), str(shards))
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    undisturbed = Workspace.open(tmp_path / "undisturbed")
    for shard, ref in enumerate(references(undisturbed)):
        with staged_artifact(ref) as folder:
            write_rows(folder, "timings", rows_of(shard))
    assert [artifact_digest(ref) for ref in refs] == [artifact_digest(ref) for ref in references(undisturbed)]
    assert committed_keys(workspace, "night-1", "timings") == refs
    assert [path.name for path in (workspace.run_folder("night-1") / STAGING).iterdir()] == ["lock"]


def test_a_kill_names_its_table(tmp_path, shards, child):
    process = child(WRITE_SHARDS, str(tmp_path), str(shards), POPALIGN_KILL_AT="after_stage:samples")
    process.communicate()
    assert process.returncode == 0
    assert len(committed_keys(Workspace.open(tmp_path), "night-1", "timings")) == 3
