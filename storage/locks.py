"""Advisory locks, which the system releases with the process: a killed run leaves none behind."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from storage.disk import disk_errors, make_folder
from storage.errors import RunInUse
from storage.layout import Workspace


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
