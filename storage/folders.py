"""A folder for others, written beside its place and renamed: it is there whole or not at all."""

import glob
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.disk import disk_errors, flush, make_folder
from storage.errors import FolderInUse
from storage.locks import try_lock


@contextmanager
def staged_folder(target: Path) -> Generator[Path]:
    """Gives an empty folder to fill, and puts it at the target on a clean exit; on an error nothing is left.

    Raises: FolderInUse if something is at the target that is no empty folder; StorageFull.
    """
    refuse_taken(target)
    with disk_errors(target):
        make_folder(target.parent)
        _remove_abandoned_drafts(target)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}~", dir=target.parent))
    with (draft / "lock").open("w") as lock:
        try_lock(lock)
        try:
            with disk_errors(target, draft):
                (draft / "files").mkdir()
                yield draft / "files"
                for path in (*(draft / "files").rglob("*"), draft / "files"):
                    flush(path)
                refuse_taken(target)
                os.rename(draft / "files", target)
                flush(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def refuse_taken(target: Path) -> None:
    """Raises: FolderInUse unless there is nothing at the target, or an empty folder."""
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise FolderInUse(f"{target} is there already and is not empty. Remove it, or choose another folder.")


def _remove_abandoned_drafts(target: Path) -> None:
    for lock in target.parent.glob(f".{glob.escape(target.name)}~*/lock"):
        with suppress(FileNotFoundError), lock.open() as stream:
            if try_lock(stream):
                shutil.rmtree(lock.parent, ignore_errors=True)
