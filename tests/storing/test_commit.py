"""The commit protocol: what is readable is complete, whatever happened in between."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage import errors
from storage.artifacts import ArtifactRef, artifact_digest, committed_keys, is_committed, verify
from storage.commit import staged_artifact
from storage.errors import (
    ConflictingArtifact,
    CorruptArtifact,
    NotCommitted,
    SchemaMismatch,
    StorageError,
    StorageFull,
    WorkspaceTooNew,
)
from storage.layout import Workspace
from storage.locks import run_lock
from storage.tables import read_rows, write_rows

POINTS = ("after_stage", "before_rename", "before_manifest", "after_commit")
WRITER = """
import sys
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.tables import write_rows
for number in range(3):
    ref = ArtifactRef(sys.argv[1], "run", "populations", f"part-{number}")
    with staged_artifact(ref) as folder:
        write_rows(folder, "refusals", [
            {"run_id": "run", "round": number, "prompt_id": f"p{row}", "reason": "tie", "detail": "x" * row}
            for row in range(50)
        ])
"""


def row(reason: str = "tie") -> dict[str, object]:
    return {"run_id": "run", "round": 1, "prompt_id": "p", "reason": reason, "detail": ""}


def write(workspace: Path, kill_at: str | None = None, limit: str = "") -> int:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    if kill_at:
        environment["POPALIGN_KILL_AT"] = kill_at
    done = subprocess.run(
        [sys.executable, "-c", limit + WRITER, str(workspace)], env=environment, capture_output=True, check=False
    )
    return done.returncode


def ref(workspace: Path, key: str = "a") -> ArtifactRef:
    return ArtifactRef(str(Workspace.open(workspace).root), "run", "populations", key)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("undisturbed")
    assert write(place) == 0
    return [artifact_digest(found) for found in committed_keys(Workspace.open(place), "run", "populations")]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_loses_nothing_and_shows_nothing_half(
    tmp_path: Path, undisturbed: list[str], point: str
) -> None:
    assert write(tmp_path, f"{point}:populations:2") == -signal.SIGKILL
    place = Workspace.open(tmp_path)
    committed = committed_keys(place, "run", "populations")
    assert len(committed) == (2 if point == "after_commit" else 1)
    for found in committed:
        verify(found)
    assert len(read_rows(place, "run", "refusals")) == 50 * len(committed)
    assert write(tmp_path) == 0
    assert [artifact_digest(found) for found in committed_keys(place, "run", "populations")] == undisturbed
    assert not [path for path in (tmp_path / "runs/run/populations").iterdir() if path.name.startswith(".")]


def test_an_error_while_staging_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch), staged_artifact(ref(tmp_path)) as folder:
        write_rows(folder, "refusals", [row(), {}])
    assert not is_committed(ref(tmp_path))
    assert list((tmp_path / "runs/run/populations").iterdir()) == []


def test_the_same_content_twice_is_no_conflict_and_other_content_is(tmp_path: Path) -> None:
    for _ in range(2):
        with staged_artifact(ref(tmp_path)) as folder:
            write_rows(folder, "refusals", [row()])
    first = artifact_digest(ref(tmp_path))
    with pytest.raises(ConflictingArtifact, match="other content"), staged_artifact(ref(tmp_path)) as folder:
        write_rows(folder, "refusals", [row("other")])
    assert artifact_digest(ref(tmp_path)) == first


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    with staged_artifact(ref(tmp_path)) as folder:
        write_rows(folder, "refusals", [row()])
    path = ref(tmp_path).folder / "refusals.parquet"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptArtifact, match=r"refusals\.parquet"):
            verify(ref(tmp_path))
    path.write_bytes(whole)
    verify(ref(tmp_path))


def test_a_truncated_shard_and_a_half_manifest_are_named(tmp_path: Path) -> None:
    with staged_artifact(ref(tmp_path)) as folder:
        write_rows(folder, "refusals", [row()])
    shard, manifest = (ref(tmp_path).folder / name for name in ("refusals.parquet", "manifest.json"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CorruptArtifact, match=r"refusals\.parquet.*run again"):
        read_rows(Workspace.open(tmp_path), "run", "refusals")
    manifest.write_text(manifest.read_text()[:20])
    with pytest.raises(CorruptArtifact, match=r"manifest\.json"):
        artifact_digest(ref(tmp_path))
    with pytest.raises(NotCommitted):
        artifact_digest(ref(tmp_path, "other"))


def test_a_full_disk_is_said_and_what_was_committed_is_safe(tmp_path: Path) -> None:
    limit = (
        "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))\n"
    )
    assert write(tmp_path, limit=limit) == 1
    assert committed_keys(Workspace.open(tmp_path), "run", "populations") == []
    assert write(tmp_path) == 0
    assert len(committed_keys(Workspace.open(tmp_path), "run", "populations")) == 3


def test_no_space_becomes_one_message(tmp_path: Path) -> None:
    with pytest.raises(StorageFull, match="free some space"), staged_artifact(ref(tmp_path)):
        raise OSError(28, "No space left on device")


def test_a_newer_workspace_is_refused_and_unharmed(tmp_path: Path) -> None:
    marker = tmp_path / "workspace.json"
    marker.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(WorkspaceTooNew, match="schema 99"):
        Workspace.open(tmp_path)
    assert json.loads(marker.read_text()) == {"schema_version": 99}


def test_one_process_a_run_and_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    place = Workspace.open(tmp_path)
    code = (
        "import sys, time\nfrom storage.layout import Workspace\nfrom storage.locks import run_lock\n"
        "with run_lock(Workspace.open(sys.argv[1]), 'run'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(errors.RunInUse, match=f"process {holder.pid}"), run_lock(place, "run"):
            pass
        holder.kill()
    with run_lock(place, "run"):
        pass


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101])
def test_unsafe_run_ids_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.InvalidName, match="not usable"):
        Workspace.open(tmp_path).run_folder(name)


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type)])
def test_errors_survive_pickling(kind: type[StorageError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what, expected, way out")))
    assert type(copy) is kind
    assert str(copy) == "what, expected, way out"
