"""Workspaces, names, errors and the lock on a run."""

import json
import os
import pickle
import signal
import socket
import string
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import errors
from storage.artifacts import ArtifactRef
from storage.errors import InvalidName, RunInUse, StorageError, WorkspaceNotUsable, WorkspaceTooNew
from storage.layout import SCHEMA_VERSION, Workspace, check_name
from storage.locks import run_lock
from storage.publication import publish_file

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StorageError)]
SAFE = set(string.ascii_letters + string.digits + "._-")
HOLD_RUN = """
import sys
from storage.layout import Workspace
from storage.locks import run_lock
with run_lock(Workspace.open(sys.argv[1]), "night-1"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_opening_makes_a_workspace_and_opens_it_again(tmp_path):
    first = Workspace.open(tmp_path / "a" / "b")
    assert Workspace.open(str(first.root)) == first
    assert json.loads((first.root / "workspace.json").read_text()) == {"schema_version": SCHEMA_VERSION}
    assert sorted(path.name for path in first.root.iterdir()) == ["workspace.json"]


def test_threads_may_open_a_new_workspace_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        opened = set(pool.map(lambda _: Workspace.open(tmp_path / "new"), range(32)))
    assert len(opened) == 1


def test_a_newer_workspace_is_refused_and_left_alone(tmp_path):
    text = json.dumps({"schema_version": SCHEMA_VERSION + 1})
    (tmp_path / "workspace.json").write_text(text)
    with pytest.raises(WorkspaceTooNew, match=rf"schema {SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}.*Update"):
        Workspace.open(tmp_path)
    assert (tmp_path / "workspace.json").read_text() == text


@pytest.mark.parametrize("text", ["", '{"schema_ver', "[]", "{}", '{"schema_version": "new"}', "3"])
def test_a_damaged_marker_is_refused(tmp_path, text):
    (tmp_path / "workspace.json").write_text(text)
    with pytest.raises(WorkspaceNotUsable, match="damaged"):
        Workspace.open(tmp_path)


def test_a_file_is_no_workspace(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WorkspaceNotUsable, match="cannot be a workspace"):
            Workspace.open(root)


@given(st.text(max_size=120) | st.text("az09._-/~", max_size=4))
def test_names_are_safe_or_refused(name):
    safe = set(name) <= SAFE and name[:1].isalnum() and len(name) <= 100
    if safe:
        assert check_name("run id", name) == name
    else:
        with pytest.raises(InvalidName) as caught:
            check_name("run id", name)
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "a b", "a\n", "é", "x" * 101])
def test_no_name_leaves_its_folder(workspace, name):
    with pytest.raises(InvalidName):
        workspace.run_folder(name)
    for fields in (("run", "table", name), ("run", name, "key"), (name, "table", "key")):
        with pytest.raises(InvalidName):
            _ = ArtifactRef(str(workspace.root), *fields).folder


def test_a_reference_survives_json(ref):
    assert ArtifactRef(**json.loads(json.dumps(asdict(ref)))) == ref
    assert pickle.loads(pickle.dumps(ref)) == ref


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_survive_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("run 'a' is 'b'")))
    assert type(error) is kind
    assert str(error) == "run 'a' is 'b'"


def test_a_run_belongs_to_one_process_until_it_ends(workspace, child):
    holder = child(HOLD_RUN, str(workspace.root))
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunInUse) as caught, run_lock(workspace, "night-1"):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)
    with run_lock(workspace, "night-2"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_lock(workspace, "night-1"):
        pass


def test_the_second_process_with_a_run_id_is_refused(workspace, child):
    with run_lock(workspace, "night-1"):
        second = child(HOLD_RUN, str(workspace.root))
        _, stderr = second.communicate()
    assert second.returncode == 1
    assert f"process {os.getpid()} on" in stderr.splitlines()[-1]


def test_published_files_are_replaced_whole(workspace):
    for content in (b"first", b""):
        path = publish_file(workspace, "night-1", "report.html", content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(InvalidName):
        publish_file(workspace, "night-1", "../report.html", b"")
