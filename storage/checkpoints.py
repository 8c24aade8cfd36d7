"""Checkpoints of unfinished work: a shortcut for the writer that goes on, never data for a reader.

runs/<run>/.checkpoints/<name>/<step>/     complete as soon as it is there

The one before stays beside it until the writer says that the newer one is good to go on from, or that it is not.
"""

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from storage.commit import crash_point
from storage.disk import disk_errors, flush, make_folder
from storage.layout import Workspace, check_name


def _folder(workspace: Workspace, run_id: str, name: str) -> Path:
    return workspace.run_folder(run_id) / ".checkpoints" / check_name("checkpoint", name)


def _complete(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in folder.glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def latest_checkpoint(workspace: Workspace, run_id: str, name: str) -> Path | None:
    """The folder of the last complete checkpoint of that name, None where there is none."""
    found = _complete(_folder(workspace, run_id, name))
    return found[-1] if found else None


@contextmanager
def staged_checkpoint(workspace: Workspace, run_id: str, name: str, step: int) -> Generator[Path]:
    """Gives an empty folder to fill, which is the latest checkpoint on a clean exit; the one before stays beside it.

    One writer at a time, who holds the run, and calls `keep_latest` or `drop_latest` before the next one.
    Raises: StorageFull.
    """
    folder = _folder(workspace, run_id, name)
    with disk_errors(folder):
        make_folder(folder)
        for leftover in folder.glob("~*"):
            shutil.rmtree(leftover, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix="~", dir=folder))
    try:
        with disk_errors(folder, draft):
            yield draft
            for path in (*draft.rglob("*"), draft):
                flush(path)
            os.rename(draft, folder / str(step))
            crash_point("after_rename", "checkpoints")
            flush(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def keep_latest(workspace: Workspace, run_id: str, name: str) -> None:
    """The latest checkpoint is sound: those before it are removed."""
    for path in _complete(_folder(workspace, run_id, name))[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def drop_latest(workspace: Workspace, run_id: str, name: str) -> None:
    """The latest checkpoint is not to go on from: it is removed, and the one before, if any, is the latest again."""
    for path in _complete(_folder(workspace, run_id, name))[-1:]:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(workspace: Workspace, run_id: str, name: str) -> None:
    """Removes all checkpoints of that name: the work is committed."""
    shutil.rmtree(_folder(workspace, run_id, name), ignore_errors=True)
