"""One process a run: an advisory lock that the system releases with the process, so a killed run leaves none."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager

from storage.errors import RunInUse
from storage.layout import Workspace


@contextmanager
def run_lock(workspace: Workspace, run_id: str) -> Generator[None]:
    """Holds a run. Raises: RunInUse at once if another process holds it."""
    folder = workspace.run_folder(run_id)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RunInUse(
                f"run {run_id!r} in {workspace.root} is being worked on by {lock.read().strip() or 'another process'}. "
                "Wait for it, stop it, or choose another --run-id."
            ) from error
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield
