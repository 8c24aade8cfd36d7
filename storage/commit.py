"""The commit protocol: stage beside, flush, rename, manifest last. A crash at any instant leaves nothing half-read."""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.artifacts import MANIFEST, ArtifactRef, Manifest, artifact_digest, file_entry, is_committed
from storage.errors import ConflictingArtifact, StorageFull
from storage.layout import Workspace

KILL_VARIABLE = "POPALIGN_KILL_AT"
_visits: dict[str, int] = {}


def crash_point(point: str, table: str) -> None:
    """For crash tests: `POPALIGN_KILL_AT=<point>:<table>[:<nth>]` ends the process here, as a power cut would."""
    wanted = os.environ.get(KILL_VARIABLE)
    if wanted is None:
        return
    name, _, nth = wanted.removeprefix(f"{point}:{table}").rpartition(":")
    if not wanted.startswith(f"{point}:{table}") or name:
        return
    _visits[wanted] = _visits.get(wanted, 0) + 1
    if _visits[wanted] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def staged_artifact(ref: ArtifactRef, facts: Mapping[str, Any] | None = None) -> Generator[Path]:
    """Gives an empty folder to write files into, and commits it on a clean exit; on an error nothing is left.

    facts: what may differ between two equal runs (times, versions); kept in the manifest, outside the digest. The
    mapping is read at the end, so it may be filled meanwhile.
    Raises: ConflictingArtifact if other content is committed there; StorageFull.
    """
    final = ref.folder
    Workspace.open(ref.workspace)
    with _disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(ref)
        staging = Path(tempfile.mkdtemp(prefix=f".{ref.key}-", dir=final.parent))
    try:
        with _disk_errors(final):
            yield staging
            _commit(ref, staging, dict(facts or {}))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_leftovers(ref: ArtifactRef) -> None:
    """Removes what a crash left of this reference: its staging folders, and its folder where no manifest names it."""
    for leftover in ref.folder.parent.glob(f".{ref.key}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if ref.folder.is_dir() and not is_committed(ref):
        shutil.rmtree(ref.folder)


def _commit(ref: ArtifactRef, staging: Path, facts: dict[str, Any]) -> None:
    crash_point("after_stage", ref.table)
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in paths:
        _flush(path)
    manifest = Manifest({path.relative_to(staging).as_posix(): file_entry(path) for path in paths}, facts)
    if is_committed(ref):
        if artifact_digest(ref) != manifest.digest:
            raise ConflictingArtifact(
                f"{ref.table}/{ref.key} of run {ref.run_id} is committed with other content. A run id names one "
                "configuration: choose another run id, or remove that run."
            )
        return
    crash_point("before_rename", ref.table)
    staging.chmod(0o755)  # mkdtemp makes it private
    os.rename(staging, ref.folder)
    _flush(ref.folder.parent)
    crash_point("before_manifest", ref.table)
    draft = ref.folder / f".{MANIFEST}"
    draft.write_text(manifest.to_json())
    _flush(draft)
    os.replace(draft, ref.folder / MANIFEST)
    _flush(ref.folder)
    crash_point("after_commit", ref.table)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StorageFull(
            f"no space left for {folder} ({error.strerror}). What was committed before is safe: free some space and "
            "run again with the same run id."
        ) from error
