"""A workspace of older table versions, taken to the current ones file by file (`popalign migrate`).

Steps are in `storage.migrations`, the order on the disk in `storage.commit.staged_rewriting`. Every file is whole and
readable at each instant, in its old form or in its new one, and its rows stay the same; a rewriting that was killed is
gone on with by the next one.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import ArtifactRef, committed_keys, file_entry, read_manifest
from storage.catalog import rebuild_catalog
from storage.commit import staged_rewriting
from storage.compaction import YOUNGEST_NS, compact
from storage.errors import CorruptArtifact
from storage.layout import Workspace
from storage.locks import run_lock
from storage.migrations import migrated
from storage.schemas import FOLDER, TABLES, VERSIONS
from storage.tables import known_version, read_rows, unreadable, write_rows


@dataclass(frozen=True)
class OldFile:
    """A committed file of an older version of its table."""

    ref: ArtifactRef
    table: str
    version: int
    rows: int
    bytes: int

    @property
    def name(self) -> str:
        """In its artifact's folder."""
        return f"{self.table}.parquet"


def old_files(workspace: Workspace) -> list[OldFile]:
    """All of a workspace, by run and artifact; nothing is touched. Raises: WorkspaceTooNew, CorruptArtifact."""
    return [file for run_id in workspace.run_ids() for file in _of_run(workspace, run_id)]


def migrate(workspace: Workspace) -> list[OldFile]:
    """Rewrites old files, then the copies for queries and the catalog; returns what was rewritten.

    Raises: as `rewrite_old_files`.
    """
    rewritten = rewrite_old_files(workspace)
    if rewritten:
        time.sleep(YOUNGEST_NS / 1e9)  # or what was just rewritten would not be copied
    # Also where nothing was left to do: the rewriting before may have been killed.
    compact(workspace)
    rebuild_catalog(workspace)
    return rewritten


def rewrite_old_files(workspace: Workspace) -> list[OldFile]:
    """Rewrites what `old_files` lists, run by run; returns it.

    Raises, before anything is touched: RunInUse if any run of the workspace is worked on, WorkspaceTooNew,
    CorruptArtifact. When a run is come to: RunInUse, CorruptArtifact for a file that is not what was committed,
    StorageFull; what was rewritten by then stays.
    """
    files = old_files(workspace)
    for run_id in workspace.run_ids() if files else ():
        with run_lock(workspace, run_id):
            pass
    rewritten: list[OldFile] = []
    for run_id, _ in groupby(files, lambda file: file.ref.run_id):
        with run_lock(workspace, run_id):
            # It may have gone on since it was listed.
            for ref, mine in groupby(_of_run(workspace, run_id), lambda file: file.ref):
                rewritten += _rewrite(workspace, ref, list(mine))
    return rewritten


def _of_run(workspace: Workspace, run_id: str) -> Iterator[OldFile]:
    for folder in sorted(TABLES.keys() - FOLDER.keys()):
        tables = [table for table in TABLES if FOLDER.get(table, table) == folder]
        for ref in committed_keys(workspace, run_id, folder):
            for table in tables:
                if (file := _examined(ref, table)) is not None:
                    yield file


def _examined(ref: ArtifactRef, table: str) -> OldFile | None:
    path = f"{ref.folder}/{table}.parquet"
    try:
        with pq.ParquetFile(path) as file:
            version, rows = known_version(file.schema_arrow, table, path), file.metadata.num_rows
    except FileNotFoundError:  # an artifact need not have all of its tables, nor keep its images
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, table, error) from error
    return None if version == VERSIONS[table] else OldFile(ref, table, version, rows, os.path.getsize(path))


def _rewrite(workspace: Workspace, ref: ArtifactRef, files: list[OldFile]) -> list[OldFile]:
    manifest = read_manifest(ref)
    for file in files:
        path = ref.folder / file.name
        # A damaged file would get a manifest that calls it sound.
        if file_entry(path) not in (manifest.files.get(file.name), manifest.former.get(file.name)):
            raise CorruptArtifact(
                f"{path} is not what its manifest says, and was not migrated. Remove {ref.folder} and run again with "
                "the same run id; what was migrated before stays, and the same command goes on."
            )
    config = _config_of(workspace, ref.run_id)
    migrations = [
        *manifest.facts.get("migrations", []),
        {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {file.table: [file.version, VERSIONS[file.table]] for file in files},
        },
    ]
    with staged_rewriting(ref, {"migrations": migrations}) as folder:
        for file in files:
            with pq.ParquetFile(ref.folder / file.name, page_checksum_verification=True) as stored:
                rows = stored.read().combine_chunks()
            write_rows(folder, file.table, migrated(file.table, file.version, rows, config))
    return files


def _config_of(workspace: Workspace, run_id: str) -> str:
    rows = read_rows(workspace, run_id, "runs", columns=["config_json"])
    return str(rows[0]["config_json"]) if rows else ""
