"""What crashed writers left goes when a run goes on; what writers are at stays, and so does all that is no table's."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from dataclasses import replace

import pytest

from storage import commit
from storage.artifacts import committed_keys, verify
from storage.commit import staged_artifact
from storage.layout import STAGING
from storage.leftovers import remove_leftovers
from storage.publication import publish_file

WRITE = """
import sys
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
with staged_artifact(ArtifactRef(*sys.argv[1:])) as folder:
    (folder / "part").write_bytes(b"content")
"""


def write(ref):
    with staged_artifact(ref) as folder:
        (folder / "part").write_bytes(b"content")


@pytest.fixture
def killed(child):
    """Writes an artifact in a process that dies at a point of its commit."""

    def kill(point, ref):
        fields = (ref.workspace, ref.run_id, ref.table, ref.key)
        process = child(WRITE, *fields, POPALIGN_KILL_AT=f"{point}:{ref.table}")
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, stderr

    return kill


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_only_what_nobody_is_at_is_removed(workspace, ref, killed):
    run = workspace.run_folder("night-1")
    half, abandoned, live = (replace(ref, key=key) for key in ("half", "abandoned", "live"))
    elsewhere = replace(half, run_id="night-2")
    write(ref)
    killed("before_manifest", half)
    killed("before_manifest", elsewhere)
    with staged_artifact(live) as draft:
        (draft / "part").write_bytes(b"content")
        killed("before_rename", abandoned)
        assert half.folder.is_dir()
        assert any(name.startswith("timings.abandoned~") for name in names(run / STAGING))

        remove_leftovers(workspace, "night-1")
        assert names(run / "timings") == [ref.key]
        assert names(run / STAGING) == ["lock", draft.parent.name]
        assert (draft / "part").read_bytes() == b"content"
    assert committed_keys(workspace, "night-1", "timings") == [live, ref]
    verify(ref)
    verify(live)
    assert elsewhere.folder.is_dir()


def test_a_writer_at_its_manifest_is_waited_for(workspace, ref, monkeypatch):
    finish = commit.write_in_one_step

    with ThreadPoolExecutor(1) as pool:
        sweeps = []

        def sweep_meanwhile(path, content):
            sweeps.append(pool.submit(remove_leftovers, workspace, "night-1"))
            with pytest.raises(StillWaiting):
                sweeps[0].result(timeout=0.3)
            finish(path, content)

        monkeypatch.setattr(commit, "write_in_one_step", sweep_meanwhile)
        write(ref)
        sweeps[0].result(timeout=60)
    verify(ref)


def test_what_is_no_tables_stays(workspace, ref):
    run = workspace.run_folder("night-1")
    write(ref)
    for kept in ("mine/pictures", ".checkpoints/round-1/5"):
        (run / kept).mkdir(parents=True)
    for kept in ("report.html", "timings/note.txt"):
        (run / kept).write_text("")
    (run / "timings" / "link").symlink_to(run / "mine")
    before = sorted(run.rglob("*"))
    remove_leftovers(workspace, "night-1")
    assert sorted(run.rglob("*")) == before


def test_a_run_that_is_not_there_has_nothing_to_remove(workspace):
    remove_leftovers(workspace, "new")
    assert names(workspace.run_folder("new") / STAGING) == ["lock"]


def test_drafts_of_a_report_go_when_they_are_old(workspace, ref):
    write(ref)
    run = workspace.run_folder(ref.run_id)
    publish_file(workspace, ref.run_id, "report.html", b"report")
    old, fresh = run / ".report.html~old", run / ".report.html~fresh"
    for draft in (old, fresh):
        draft.write_bytes(b"half a rep")
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))
    remove_leftovers(workspace, ref.run_id)
    assert not old.exists()
    assert fresh.exists()
    assert (run / "report.html").read_bytes() == b"report"
