"""The disk itself: flushing, and what it says when it is full."""

import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import StorageError, StorageFull

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, on the disk as well."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)


def write_in_one_step(path: Path, content: bytes) -> None:
    """Writes or replaces a file: who reads it sees the old bytes or the new ones, even after a power cut."""
    # Threads and processes may write the same file at once: each its own draft.
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}~", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)  # mkstemp makes it private
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
    flush(path.parent)


@contextmanager
def disk_errors(folder: Path, staged: Path | None = None) -> Generator[None]:
    """Turns "disk full" from any library into StorageFull.

    folder: what was to be written, for the message. staged: holds what was written so far.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        reason = _reason_full(error)
        if reason is None:
            raise
        raise StorageFull(_full_message(folder, staged, reason)) from error


def _reason_full(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.errno in FULL:
        return os.strerror(error.errno or 0)
    # safetensors and DuckDB have errors of their own, with the system's words inside.
    return next((words for code in FULL if (words := os.strerror(code)) in str(error)), None)


def _full_message(folder: Path, staged: Path | None, reason: str) -> str:
    files = [path for path in staged.rglob("*") if path.is_file()] if staged else []
    needed = f"over {_size(sum(path.stat().st_size for path in files))} needed, " if staged else ""
    # The folder itself may not exist yet.
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return (
        f"{folder} was not written ({reason}): {needed}{_size(shutil.disk_usage(existing).free)} free. What was "
        "committed before is safe: free some space and run again with the same run id."
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
