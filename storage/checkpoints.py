"""Checkpoints of unfinished work: a shortcut for the writer that goes on, never data for a reader.

runs/<run>/.checkpoints/<name>/<step>/     complete as soon as it is there; the older one goes after that
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


def latest_checkpoint(workspace: Workspace, run_id: str, name: str) -> Path | None:
    """The folder of the last complete checkpoint of that name, None where there is none."""
    folder = _folder(workspace, run_id, name)
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return folder / str(max(steps)) if steps else None


@contextmanager
def staged_checkpoint(workspace: Workspace, run_id: str, name: str, step: int) -> Generator[Path]:
    """Gives an empty folder to fill, which takes the place of the earlier checkpoint on a clean exit.

    One writer at a time, who holds the run. Raises: StorageFull; the earlier checkpoint then stays.
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
            earlier = [path for path in folder.glob("*") if path.name.isdigit()]
            os.rename(draft, folder / str(step))
            crash_point("after_rename", "checkpoints")
            flush(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for path in earlier:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints(workspace: Workspace, run_id: str, name: str) -> None:
    """Removes all checkpoints of that name: the work is committed."""
    shutil.rmtree(_folder(workspace, run_id, name), ignore_errors=True)
