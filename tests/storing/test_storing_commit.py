"""The commit protocol, undisturbed and with errors, leftovers, rivals and a full disk."""

import json
import os
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.artifacts import artifact_digest, committed_keys, is_committed, read_manifest, verify
from storage.commit import crash_point, staged_artifact
from storage.errors import ConflictingArtifact, InvalidName, NotCommitted, StorageFull
from storage.layout import STAGING, Workspace
from storage.tables import write_rows

LIMITED = """
import resource, signal, sys
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import StorageFull
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with staged_artifact(ArtifactRef(sys.argv[1], "night-1", "timings", "shard-0")) as folder:
        (folder / "part").write_bytes(bytes(100))
except StorageFull as error:
    print(error)
"""


def leftovers(ref):
    """Every file of the run except the lock of the writers."""
    return sorted(path.name for path in ref.folder.parents[1].rglob("*") if path.is_file() and path.name != "lock")


def commit(ref, content=b"content", **more):
    with staged_artifact(ref, **more) as folder:
        (folder / "part").write_bytes(content)


def test_nothing_is_visible_before_the_end(ref, workspace):
    with staged_artifact(ref) as folder:
        assert list(folder.iterdir()) == []
        (folder / "part").write_bytes(b"content")
        assert not is_committed(ref)
        assert committed_keys(workspace, "night-1", "timings") == []
        with pytest.raises(NotCommitted, match=r"timings/shard-0 of run night-1 is not committed"):
            read_manifest(ref)
    assert committed_keys(workspace, "night-1", "timings") == [ref]
    assert leftovers(ref) == ["manifest.json", "part"]
    verify(ref)


def test_facts_and_inputs_stay_out_of_the_digest(ref):
    other, facts = replace(ref, key="shard-1"), {}
    with staged_artifact(ref, facts, {"model": "abc"}) as folder:
        (folder / "part").write_bytes(b"content")
        facts["seconds"] = 3.5  # read at the end
    commit(other, facts={"seconds": 4.0})
    assert artifact_digest(ref) == artifact_digest(other)
    assert read_manifest(ref).facts == {"seconds": 3.5}
    assert read_manifest(ref).inputs == {"model": "abc"}
    assert read_manifest(other).inputs == {}


def test_a_folder_of_weights_is_committed_whole(ref):
    with staged_artifact(ref) as folder:
        (folder / "unet" / "empty").mkdir(parents=True)
        (folder / "unet" / "config.json").write_text("{}")
        (folder / "timings.parquet").write_bytes(b"")
    assert sorted(read_manifest(ref).files) == ["timings.parquet", "unet/config.json"]
    assert (ref.folder.stat().st_mode & 0o777) == (ref.folder.parent.stat().st_mode & 0o777)
    verify(ref)


def test_an_error_leaves_nothing(ref):
    def diverge():
        with staged_artifact(ref) as folder:
            (folder / "part").write_bytes(b"content")
            raise RuntimeError("loss is nan")

    with pytest.raises(RuntimeError, match="loss is nan"):
        diverge()
    assert leftovers(ref) == []


def test_equal_content_is_committed_once_and_other_content_never(ref):
    commit(ref, facts={"try": 1})
    commit(ref, facts={"try": 2})
    assert read_manifest(ref).facts == {"try": 1}
    with pytest.raises(ConflictingArtifact, match="other content"):
        commit(ref, b"other")
    assert (ref.folder / "part").read_bytes() == b"content"
    assert leftovers(ref) == ["manifest.json", "part"]


@pytest.mark.parametrize("name", ["manifest.json", "removed.json"])
def test_names_of_storages_own_files_are_taken(ref, name):
    with pytest.raises(InvalidName, match=re.escape(name)), staged_artifact(ref) as folder:
        (folder / name).write_text(json.dumps({"files": {}, "facts": {}}))
    assert leftovers(ref) == []


def test_a_folder_without_a_manifest_is_removed_by_the_next_writer(ref, workspace):
    neighbours = [replace(ref, key=key) for key in ("shard-0-b", "shard-00")]
    for abandoned in (ref, *neighbours):
        (workspace.run_folder("night-1") / STAGING / f"timings.{abandoned.key}~abc" / "files").mkdir(parents=True)
        abandoned.folder.mkdir(parents=True)
        (abandoned.folder / "timings.parquet").write_bytes(b"half")
        (abandoned.folder / ".manifest.json~abc").write_text('{"files": {')
    assert committed_keys(workspace, "night-1", "timings") == []
    commit(ref)
    assert committed_keys(workspace, "night-1", "timings") == [ref]
    assert sorted(path.name for path in ref.folder.iterdir()) == ["manifest.json", "part"]
    assert [path.name for path in (workspace.run_folder("night-1") / STAGING).iterdir()] == ["lock"]
    # The half commits of other references are left to the next start of the run: no commit looks through all of it.
    assert all(neighbour.folder.is_dir() for neighbour in neighbours)


def test_writers_side_by_side_keep_their_drafts(ref):
    other = replace(ref, key="shard-0-b")
    with staged_artifact(ref) as mine, staged_artifact(other) as theirs:
        (mine / "part").write_bytes(b"mine")
        (theirs / "part").write_bytes(b"theirs")
        commit(replace(ref, key="shard-1"))
        assert (mine / "part").read_bytes() + (theirs / "part").read_bytes() == b"minetheirs"
    verify(ref)
    verify(other)


def test_two_writers_of_one_reference_do_not_disturb_each_other(ref):
    with staged_artifact(ref) as slow:
        (slow / "part").write_bytes(b"content")
        commit(ref)
        assert (slow / "part").read_bytes() == b"content"
    with pytest.raises(ConflictingArtifact), staged_artifact(ref) as slow:
        (slow / "part").write_bytes(b"other")
    verify(ref)
    assert leftovers(ref) == ["manifest.json", "part"]


def test_a_full_disk_while_writing_is_told_and_leaves_nothing(ref, timing):
    def fill_the_disk():
        with staged_artifact(ref) as folder:
            (folder / "samples.parquet").write_bytes(bytes(3_000_000))
            # The device answers every write as a full disk does. By a link: Arrow removes what it fails to write.
            (folder / "timings.parquet").symlink_to("/dev/full")
            write_rows(folder, "timings", [timing()])

    with pytest.raises(StorageFull) as caught:
        fill_the_disk()
    message = str(caught.value)
    assert str(ref.folder) in message
    assert os.strerror(28) in message
    assert "over 3.0 MB needed" in message
    assert "free some space and run again" in message
    assert leftovers(ref) == []
    commit(ref)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_full_disk_is_recognised_in_other_libraries_errors(ref, kind):
    with pytest.raises(StorageFull, match=r"No space left on device"), staged_artifact(ref):
        raise kind("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("limit", [50, 150])
def test_no_room_for_a_file_or_for_the_manifest(workspace, ref, child, limit):
    """A limit on the size of files: the data hits the lower one, the manifest the higher one."""
    process = child(LIMITED, str(workspace.root), str(limit), PYTHONDONTWRITEBYTECODE="1")
    stdout, stderr = process.communicate()
    assert os.strerror(27) in stdout, stderr
    assert leftovers(ref) == []
    assert not ref.folder.exists()


def test_crash_points_are_off_without_the_variable(monkeypatch):
    monkeypatch.delenv("POPALIGN_KILL_AT", raising=False)
    crash_point("after_stage", "samples")
    monkeypatch.setenv("POPALIGN_KILL_AT", "after_stage:samples:2")
    crash_point("after_stage", "sample")
    crash_point("before_rename", "samples")
    crash_point("after_stage", "samples")  # the first of two


NAMES = st.text("abc/._", min_size=1, max_size=8).filter(
    lambda name: not {"", ".", ".."} & set(name.split("/")) and name != "manifest.json"
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.dictionaries(NAMES, st.binary(max_size=50), max_size=3))
def test_any_files_come_back(tmp_path_factory, ref, files):
    root = Workspace.open(tmp_path_factory.mktemp("any")).root
    ref = replace(ref, workspace=str(root))
    # No name may be another one's folder.
    files = {name: data for name, data in files.items() if not any(n.startswith(f"{name}/") for n in files)}
    with staged_artifact(ref) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    assert {name: (ref.folder / name).read_bytes() for name in read_manifest(ref).files} == files
    verify(ref)
