"""References to committed directories, and the manifests that make them trustworthy."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from storage.errors import CorruptArtifact, NotCommitted, RemovedArtifact
from storage.layout import Workspace, check_name

MANIFEST = "manifest.json"
REMOVED = "removed.json"


@dataclass(frozen=True)
class ArtifactRef:
    """Names one committed directory: all that passes between tasks, as JSON by `dataclasses.asdict`.

    workspace: absolute path. table: names the folder, which may hold further tables (`storage.tables.FOLDER`).
    """

    workspace: str
    run_id: str
    table: str
    key: str

    @property
    def folder(self) -> Path:
        """Where it lies once committed."""
        run = Workspace(Path(self.workspace)).run_folder(self.run_id)
        return run / check_name("table", self.table) / check_name("key", self.key)


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was committed.

    facts: times, versions, host: everything that may differ between two equal runs.
    inputs: digests of what it was made from, by name.
    former: files that were rewritten, as they were just before (`storage.commit.staged_rewriting`).
    first_digest: of the artifact before any rewriting; empty if there was none.
    """

    files: dict[str, FileEntry]
    facts: dict[str, Any]
    inputs: dict[str, str]
    former: dict[str, FileEntry] = field(default_factory=dict[str, FileEntry])
    first_digest: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents as they were first committed; neither over facts nor over inputs.

        What refers to an artifact, like the registry to a model, so refers to it after a rewriting as well.
        """
        if self.first_digest:
            return self.first_digest
        lines = [f"{name} {entry.sha256}" for name, entry in sorted(self.files.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_json(self) -> str:
        """As it is written."""
        values: dict[str, Any] = {"files": _plain(self.files), "inputs": self.inputs, "facts": self.facts}
        if self.first_digest:
            values |= {"former": _plain(self.former), "first_digest": self.first_digest}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Tombstone:
    """What was removed from a committed artifact on purpose, written before the files go (`storage.retention`).

    files: as the manifest names them. removed_at: UTC, ISO 8601. why: in words.
    """

    files: dict[str, FileEntry]
    removed_at: str
    why: str

    def to_json(self) -> str:
        """As it is written."""
        values = {"files": _plain(self.files), "removed_at": self.removed_at, "why": self.why}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"


def is_committed(ref: ArtifactRef) -> bool:
    """Existence of the manifest means completeness."""
    return (ref.folder / MANIFEST).is_file()


def read_manifest(ref: ArtifactRef) -> Manifest:
    """Raises: NotCommitted, CorruptArtifact where the manifest is no JSON of ours."""
    path = ref.folder / MANIFEST
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text()))
        former = _entries({"files": values.get("former", {})})
        first = str(values.get("first_digest", ""))
        return Manifest(_entries(values), values["facts"], values.get("inputs", {}), former, first)
    except FileNotFoundError as error:
        raise NotCommitted(f"{ref.table}/{ref.key} of run {ref.run_id} is not committed in {ref.workspace}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{path} is not a manifest ({error}); remove {ref.folder} and run again with the same run id."
        ) from error


def read_tombstone(ref: ArtifactRef) -> Tombstone | None:
    """What was removed from an artifact; None where it is whole. Raises: CorruptArtifact if it is no JSON of ours."""
    path = ref.folder / REMOVED
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text()))
        return Tombstone(_entries(values), str(values["removed_at"]), str(values["why"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{path} does not say which files were removed ({error}); remove {ref.folder} and run again with the same "
            "run id."
        ) from error


def require_present(ref: ArtifactRef, part: str) -> None:
    """Refuses an artifact that lost a part. part: a file, or a folder like `unet`. Raises: RemovedArtifact."""
    tombstone = read_tombstone(ref)
    if tombstone and any(name == part or name.startswith(f"{part}/") for name in tombstone.files):
        raise RemovedArtifact(
            f"{part} of {ref.table}/{ref.key} of run {ref.run_id} was removed by `popalign gc` on "
            f"{tombstone.removed_at[:10]} ({tombstone.why}); its tables are still there. Run again under another run "
            "id; `popalign gc --what` says what to remove, everything else is kept."
        )


def _plain(files: dict[str, FileEntry]) -> dict[str, dict[str, Any]]:
    return {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(files.items())}


def _entries(values: dict[str, Any]) -> dict[str, FileEntry]:
    entries = cast("dict[str, dict[str, Any]]", values["files"])
    return {name: FileEntry(int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}


def artifact_digest(ref: ArtifactRef) -> str:
    """Digest of a committed artifact's contents, as they were first committed."""
    return read_manifest(ref).digest


def committed_folders(workspace: Workspace, run_id: str, table: str) -> list[str]:
    """Paths of all committed artifacts of a table, by key. Strings: quick with many thousands."""
    folder = str(workspace.run_folder(run_id) / check_name("table", table))
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    paths = (f"{folder}/{name}" for name in names)
    return [path for path in paths if os.path.exists(f"{path}/{MANIFEST}")]


def committed_keys(workspace: Workspace, run_id: str, table: str) -> list[ArtifactRef]:
    """All committed artifacts of a table, by key."""
    keys = (os.path.basename(path) for path in committed_folders(workspace, run_id, table))
    return [ArtifactRef(str(workspace.root), run_id, table, key) for key in keys]


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file as it lies on disk."""
    with path.open("rb") as stream:
        return FileEntry(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def verify(ref: ArtifactRef) -> None:
    """Hashes every file again; one that is missing must have been removed on purpose, by its tombstone.

    A file may be in its former form as well: then a rewriting did not come to it. Raises: CorruptArtifact naming the
    file.
    """
    tombstone = read_tombstone(ref)
    removed = tombstone.files if tombstone else {}
    manifest = read_manifest(ref)
    for name, entry in manifest.files.items():
        path = ref.folder / name
        if not path.is_file():
            if removed.get(name) == entry:
                continue
            raise CorruptArtifact(f"{path} is missing; remove {ref.folder} and run again with the same run id.")
        found = file_entry(path)
        if found not in (entry, manifest.former.get(name)):
            raise CorruptArtifact(
                f"{path} has {found.bytes} bytes and hash {found.sha256[:12]}, its manifest says {entry.bytes} and "
                f"{entry.sha256[:12]}; remove {ref.folder} and run again with the same run id."
            )
