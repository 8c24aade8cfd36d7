"""The removal of what old runs may lose (`storage.retention`), safe against a kill at any instant.

A tombstone beside the manifest names the files before they go. A removal that is killed leaves files that a tombstone
names; the next one with the same choice removes them.
"""

import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from storage.artifacts import REMOVED, Tombstone, read_manifest, read_tombstone
from storage.catalog import rebuild_catalog
from storage.commit import crash_point
from storage.disk import disk_errors, flush, make_folder, write_in_one_step
from storage.errors import StorageError, StorageFull
from storage.layout import STAGING, Workspace
from storage.locks import run_lock
from storage.registry import registry_lock
from storage.retention import (
    CHECKPOINTS,
    MOVED_CHECKPOINTS,
    Choice,
    Models,
    OldRun,
    Part,
    checkpoint_folders,
    look_at,
    removable,
    starting_models,
)


def remove(
    workspace: Workspace, choice: Choice, protected: Callable[[], Models], now: float | None = None
) -> list[OldRun]:
    """Removes what `removable` lists; a run that is in use stays, and says so. Meanwhile no model can be promoted.

    protected: asked again for each run. Raises: StorageFull where not even a tombstone can be written.
    """
    outcome: list[OldRun] = []
    for listed in removable(workspace, choice, protected(), now):
        try:
            with run_lock(workspace, listed.run_id), registry_lock(workspace):
                # It may have gone on, or been promoted, since it was listed.
                kept = protected() | starting_models(workspace)
                run = look_at(workspace, listed.run_id, choice, kept, now)
                for part in run.parts if run is not None else ():
                    _remove_part(workspace, listed, part)
        except StorageFull:
            raise
        except StorageError as error:  # in use, or damaged
            run = replace(listed, parts=(), problem=str(error))
        outcome.append(run or replace(listed, parts=(), problem="it went on, or lost its files, since it was listed."))
    if workspace.catalog.is_file():
        rebuild_catalog(workspace)
    return outcome


def _remove_part(workspace: Workspace, run: OldRun, part: Part) -> None:
    ref = part.ref
    if ref is None:
        _remove_checkpoints(workspace.run_folder(run.run_id))
        return
    for draft in ref.folder.glob(f".{REMOVED}~*"):
        draft.unlink(missing_ok=True)
    earlier, manifest = read_tombstone(ref), read_manifest(ref)
    files = (earlier.files if earlier else {}) | {name: manifest.files[name] for name in part.names}
    decided = "not finished" if run.decision == "none" else f"decision {run.decision}"
    why = f"{decided}, {run.age_days:.0f} days after its last commit or start"
    tombstone = Tombstone(files, datetime.now(UTC).isoformat(timespec="seconds"), why)
    crash_point("before_tombstone", ref.table)
    with disk_errors(ref.folder):
        write_in_one_step(ref.folder / REMOVED, tombstone.to_json().encode())
    crash_point("after_tombstone", ref.table)
    for name in part.names:
        (ref.folder / name).unlink(missing_ok=True)
        crash_point("after_unlink", ref.table)
    for folder in sorted({ref.folder / name for name in part.names}, reverse=True):
        _remove_empty(folder.parent, ref.folder)
    flush(ref.folder)


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _remove_checkpoints(run: Path) -> None:
    # One rename: half of a checkpoint would look like a whole one.
    make_folder(run / STAGING)
    if (run / CHECKPOINTS).is_dir():
        os.rename(run / CHECKPOINTS, run / STAGING / f"{MOVED_CHECKPOINTS}{secrets.token_hex(4)}")
    crash_point("after_rename", "checkpoints")
    for folder in checkpoint_folders(run):
        shutil.rmtree(folder, ignore_errors=True)
