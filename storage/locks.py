"""Advisory locks, which the system releases with the process: a killed run leaves none behind."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from storage.artifacts import ArtifactRef, is_committed
from storage.disk import disk_errors, make_folder
from storage.errors import RunInUse
from storage.layout import STAGING, Workspace


@contextmanager
def exclusive(path: Path) -> Generator[None]:
    """Holds a lock file alone, waiting for whoever holds it: for critical sections of milliseconds."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def try_lock(stream: TextIO) -> bool:
    """Locks an open file until it is closed; False at once if somebody else holds it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def run_lock(workspace: Workspace, run_id: str) -> Generator[None]:
    """Holds a run. Raises: RunInUse at once if another process holds it."""
    folder = workspace.run_folder(run_id)
    with disk_errors(folder):
        make_folder(folder)
    with (folder / ".lock").open("a+") as lock:
        if not try_lock(lock):
            lock.seek(0)
            raise RunInUse(
                f"run {run_id!r} in {workspace.root} is being worked on by {lock.read().strip() or 'another process'}. "
                "Wait for it, stop it, or choose another --run-id."
            )
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@contextmanager
def claimed(ref: ArtifactRef) -> Generator[bool]:
    """Whether this process may write an artifact: False at once if it is committed, or another process is at it.

    Spares work that would be thrown away; that two writers of one artifact do no harm is the commit's affair. On a
    network disk whose locks do not reach other hosts, work is done twice and nothing is lost.
    """
    folder = Workspace(Path(ref.workspace)).run_folder(ref.run_id) / STAGING
    with disk_errors(folder):
        make_folder(folder)
    path = folder / f"{ref.table}.{ref.key}.claim"
    if is_committed(ref):
        yield False
        return
    with path.open("a") as stream:
        if not try_lock(stream):
            yield False
            return
        # Whoever opened the file before it is removed finds the artifact committed, or does the work once more.
        try:
            yield not is_committed(ref)
        finally:
            path.unlink(missing_ok=True)
