"""What crashed writers of a run left, removed all at once when the run starts or goes on."""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from storage.artifacts import MANIFEST
from storage.commit import remove_abandoned_drafts
from storage.disk import disk_errors, make_folder
from storage.layout import STAGING, Workspace
from storage.locks import exclusive, try_lock
from storage.schemas import FOLDER, TABLES


def remove_leftovers(workspace: Workspace, run_id: str) -> None:
    """Removes a run's abandoned drafts and its half commits; what writers are at, and what is no table's, stays.

    Waits for a writer that is between its rename and its manifest. Raises: InvalidName, StorageFull.
    """
    run = workspace.run_folder(run_id)
    with disk_errors(run):
        make_folder(run / STAGING)
        with exclusive(run / STAGING / "lock"):
            remove_abandoned_drafts(run / STAGING)
            _remove_abandoned_claims(run / STAGING)
            for folder in _half_commits(run):
                shutil.rmtree(folder, ignore_errors=True)
        for draft in _old_file_drafts(run):
            draft.unlink(missing_ok=True)


def _remove_abandoned_claims(staging: Path) -> None:
    for claim in staging.glob("*.claim"):
        with suppress(FileNotFoundError), claim.open() as lock:
            if try_lock(lock):
                claim.unlink()


def _half_commits(run: Path) -> Iterator[Path]:
    """Folders where a table's artifacts lie, without a manifest."""
    for table in TABLES.keys() - FOLDER.keys():
        for folder in (run / table).glob("[!.]*"):
            if folder.is_dir() and not folder.is_symlink() and not (folder / MANIFEST).is_file():
                yield folder


def _old_file_drafts(run: Path) -> Iterator[Path]:
    """Drafts of `write_in_one_step` that no living writer can be at: a report takes seconds."""
    oldest = time.time() - 3600
    for draft in run.glob(".*~*"):
        if draft.is_file() and draft.stat().st_mtime < oldest:
            yield draft
