"""The commit protocol: stage beside, flush, rename, manifest last. A crash at any instant leaves nothing half-read.

    runs/<run>/<table>/<key>/                      committed, once manifest.json is in it; its rows never change again
    runs/<run>/.staging/<table>.<key>~<random>/    being written: `files`, and a lock that the writer holds
    runs/<run>/.staging/lock                       held while a writer starts, and from its rename to its manifest
    runs/<run>/.staging/<table>.<key>.claim        held by who makes the artifact (`storage.locks.claimed`)

What a crash leaves has no manifest, or lies in `.staging` and nobody locks it: no reader takes it for data. The
next writer of the run removes such drafts, the next one of the same reference its half commit. A run that starts or
goes on removes all of it (`storage.leftovers`): the reference of a half commit may never be written again, like the
timing of a piece of work that is committed already.

Files of a committed artifact can get another form (`staged_rewriting`): the manifest that knows both forms comes first,
then each file takes its place in one step. Renaming a whole folder onto another cannot be done in one step everywhere.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from storage.artifacts import (
    MANIFEST,
    REMOVED,
    ArtifactRef,
    FileEntry,
    Manifest,
    artifact_digest,
    file_entry,
    is_committed,
    read_manifest,
)
from storage.disk import disk_errors, flush, make_folder, write_in_one_step
from storage.errors import ConflictingArtifact, InvalidName
from storage.layout import STAGING, Workspace
from storage.locks import exclusive, try_lock

KILL_VARIABLE = "POPALIGN_KILL_AT"
_visits: dict[str, int] = {}


def crash_point(point: str, table: str) -> None:
    """For crash tests: `POPALIGN_KILL_AT=<point>:<table>[:<nth>]` ends the process here, as a power cut would.

    Points: after_stage, before_rename, before_manifest, after_commit; after_manifest and after_file of a rewriting;
    after_rename of checkpoints. nth: from 1, counted over the process.
    """
    wanted = os.environ.get(KILL_VARIABLE)
    if wanted is None:
        return
    name, wanted_table, nth = [*wanted.split(":"), "1"][:3]
    if (name, wanted_table) != (point, table):
        return
    _visits[wanted] = _visits.get(wanted, 0) + 1
    if _visits[wanted] == int(nth):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def staged_artifact(
    ref: ArtifactRef, facts: Mapping[str, Any] | None = None, inputs: Mapping[str, str] | None = None
) -> Generator[Path]:
    """Gives an empty folder to write files into, and commits it on a clean exit; on an error nothing is left.

    facts: what may differ between two equal runs (times, versions); kept in the manifest, outside the digest. The
    mapping is read at the end, so it may be filled meanwhile. inputs: digests of what it is made from, by name.
    Equal content that is already committed stays as it is.
    Raises: ConflictingArtifact if other content is committed there; StorageFull; InvalidName.
    """
    Workspace.open(ref.workspace)
    with disk_errors(ref.folder):
        draft, lock = _start(ref)
    try:
        with disk_errors(ref.folder, draft):
            yield draft / "files"
            _commit(ref, draft / "files", dict(facts or {}), dict(inputs or {}))
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.close()


@contextmanager
def staged_rewriting(ref: ArtifactRef, facts: Mapping[str, Any]) -> Generator[Path]:
    """Gives an empty folder for another form of files of a committed artifact; they take their places on a clean exit.

    Killed at any instant it leaves every file whole, in one of the two forms that the manifest names, and the same
    rewriting can be done again. The artifact keeps its digest and its age. facts: added to the manifest's.
    The caller holds the run. Raises: NotCommitted, CorruptArtifact, StorageFull.
    """
    with disk_errors(ref.folder):
        draft, lock = _start(ref)
    try:
        with disk_errors(ref.folder, draft):
            yield draft / "files"
            _rewrite(ref, draft / "files", facts)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        lock.close()


def _rewrite(ref: ArtifactRef, files: Path, facts: Mapping[str, Any]) -> None:
    crash_point("after_stage", ref.table)
    entries = _flushed_entries(files)
    path = ref.folder / MANIFEST
    with exclusive(_staging(ref) / "lock"):
        old = read_manifest(ref)
        former = old.former | {name: file_entry(ref.folder / name) for name in entries}
        new = Manifest(old.files | entries, {**old.facts, **facts}, old.inputs, former, old.digest)
        for leftover in ref.folder.glob(f".{MANIFEST}~*"):
            leftover.unlink(missing_ok=True)
        # `popalign gc` counts a run's age from here.
        committed = path.stat().st_mtime_ns
        write_in_one_step(path, new.to_json().encode())
        os.utime(path, ns=(committed, committed))
        crash_point("after_manifest", ref.table)
        # Copies for queries are trusted while this time stays (`storage.compaction`): neither those made before nor
        # those made meanwhile hold what the files hold now.
        os.utime(ref.folder.parent)
        for name in entries:
            os.replace(files / name, ref.folder / name)
            crash_point("after_file", ref.table)
        flush(ref.folder)
        os.utime(ref.folder.parent)


def _staging(ref: ArtifactRef) -> Path:
    return ref.folder.parent.parent / STAGING


def _start(ref: ArtifactRef) -> tuple[Path, TextIO]:
    make_folder(ref.folder.parent)
    make_folder(_staging(ref))
    with exclusive(_staging(ref) / "lock"):
        remove_abandoned_drafts(_staging(ref))
        if ref.folder.is_dir() and not is_committed(ref):
            shutil.rmtree(ref.folder)
        draft = Path(tempfile.mkdtemp(prefix=f"{ref.table}.{ref.key}~", dir=_staging(ref)))
        lock = (draft / "lock").open("w")
        try_lock(lock)
    (draft / "files").mkdir()
    return draft, lock


def remove_abandoned_drafts(staging: Path) -> None:
    """Removes a run's drafts that nobody locks.

    The caller holds `.staging/lock`, under which a draft is made and locked.
    """
    for draft in staging.glob("*~*"):
        try:
            with (draft / "lock").open() as lock:
                abandoned = try_lock(lock)
        except FileNotFoundError:
            abandoned = True
        if abandoned:
            shutil.rmtree(draft, ignore_errors=True)


def _commit(ref: ArtifactRef, files: Path, facts: dict[str, Any], inputs: dict[str, str]) -> None:
    crash_point("after_stage", ref.table)
    manifest = Manifest(_flushed_entries(files), facts, inputs)
    with exclusive(_staging(ref) / "lock"):
        if is_committed(ref):
            if artifact_digest(ref) != manifest.digest and read_manifest(ref).files != manifest.files:
                raise ConflictingArtifact(
                    f"{ref.table}/{ref.key} of run {ref.run_id} is committed with other content. A run id names one "
                    "configuration: choose another run id, or remove that run."
                )
            return
        crash_point("before_rename", ref.table)
        _publish(ref, files, manifest)
    crash_point("after_commit", ref.table)


def _flushed_entries(files: Path) -> dict[str, FileEntry]:
    for name in (MANIFEST, REMOVED):
        if (files / name).exists():
            raise InvalidName(f"an artifact's file may not be called {name}: storage keeps its own there. Rename it.")
    paths = sorted(files.rglob("*"))
    for path in (*paths, files):
        flush(path)
    return {path.relative_to(files).as_posix(): file_entry(path) for path in paths if path.is_file()}


def _publish(ref: ArtifactRef, files: Path, manifest: Manifest) -> None:
    if ref.folder.is_dir():
        shutil.rmtree(ref.folder)  # of a writer that crashed while this one was at work
    os.rename(files, ref.folder)
    try:
        flush(ref.folder.parent)
        crash_point("before_manifest", ref.table)
        write_in_one_step(ref.folder / MANIFEST, manifest.to_json().encode())
    finally:
        if not is_committed(ref):
            shutil.rmtree(ref.folder, ignore_errors=True)
