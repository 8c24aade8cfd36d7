"""Rewrites committed tables of older versions in today's columns, one artifact after another; a kill loses nothing.

Readers and the catalog take old files as they are, with null in columns that came later. A migration fills what can be
told, and makes the files alike for those who read them without popalign. Of each artifact the manifest is written
first, then its tables, each in one step: one that was stopped in between still has a table of an older version, so that
the next migration does it again and comes to the same bytes.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.artifacts import MANIFEST, MIGRATED, ArtifactRef, committed_keys, file_entry, read_manifest
from storage.commit import crash_point
from storage.disk import disk_errors, flush, make_folder, write_in_one_step
from storage.layout import STAGING, Workspace
from storage.locks import run_lock
from storage.schemas import FOLDER, TABLES, VERSIONS
from storage.tables import stored_version, write_rows

Step = Callable[[pa.Table], pa.Table]


def _as_it_is(table: pa.Table) -> pa.Table:
    """What came with this version was not recorded before, and stays null."""
    return table


def _own_images(table: pa.Table) -> pa.Table:
    """Before models could be trained on another run's images, each was trained on its own run's."""
    return table.append_column("data_run_id", table["run_id"])


def _wilson(table: pa.Table) -> pa.Table:
    """All intervals of shares were Wilson's before small cells had exact ones."""
    return table.append_column("interval", pa.array(["wilson"] * len(table)))


def _uniform(table: pa.Table) -> pa.Table:
    """Populations were aimed at equal shares before they could be aimed past them: a row a group says how many."""
    keys = ["run_id", "population_id", "axis"]
    groups = table.group_by(keys).aggregate([("group", "count")])
    counted = table.append_column("row", pa.array(range(len(table)))).join(groups, keys).sort_by("row")
    share = pc.divide(1.0, pc.cast(counted["group_count"], pa.float64()))
    return table.append_column("target", pc.cast(share, pa.float32()))


# From which version of a table: how its rows become those of the next.
STEPS: dict[tuple[str, int], Step] = {
    ("disparities", 1): _as_it_is,
    ("group_shares", 1): _wilson,
    ("models", 1): _own_images,
    ("models", 2): _as_it_is,
    ("populations", 1): _uniform,
    ("seed_summaries", 1): _as_it_is,
    ("timings", 1): _as_it_is,
    ("training_steps", 1): _as_it_is,
    ("validations", 1): _as_it_is,
}


@dataclass(frozen=True)
class OldTable:
    """A committed file of an older version."""

    ref: ArtifactRef
    table: str
    version: int
    rows: int
    bytes: int

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.ref.folder / f"{self.table}.parquet"


def old_tables(workspace: Workspace) -> Iterator[OldTable]:
    """All of a workspace, by run; only the ends of files are read. Raises: CorruptArtifact, WorkspaceTooNew."""
    for run_id in workspace.run_ids():
        for table in TABLES:
            if VERSIONS[table] > 1:
                yield from _old_files(workspace, run_id, table)


def _old_files(workspace: Workspace, run_id: str, table: str) -> Iterator[OldTable]:
    for ref in committed_keys(workspace, run_id, FOLDER.get(table, table)):
        path = ref.folder / f"{table}.parquet"
        if path.is_file():
            version, rows = stored_version(str(path), table)
            if version < VERSIONS[table]:
                yield OldTable(ref, table, version, rows, path.stat().st_size)


def migrate_run(workspace: Workspace, run_id: str) -> int:
    """Rewrites a run's old tables; how many. Nobody may be working on the run.

    Raises: RunInUse, CorruptArtifact, StorageFull.
    """
    done = 0
    with run_lock(workspace, run_id):
        by_artifact: dict[ArtifactRef, list[OldTable]] = {}
        for table in TABLES:
            for old in _old_files(workspace, run_id, table):
                by_artifact.setdefault(old.ref, []).append(old)
        for ref, tables in by_artifact.items():
            _migrate_artifact(ref, tables)
            done += len(tables)
    return done


def _migrate_artifact(ref: ArtifactRef, tables: list[OldTable]) -> None:
    staging = ref.folder.parent.parent / STAGING / "migration"
    with disk_errors(ref.folder, staging):
        shutil.rmtree(staging, ignore_errors=True)
        make_folder(staging)
        manifest = read_manifest(ref)
        for old in tables:
            write_rows(staging, old.table, _stepped(old))
            flush(staging / old.path.name)
        entries = {old.path.name: file_entry(staging / old.path.name) for old in tables}
        facts = {**manifest.facts, MIGRATED: {old.table: [old.version, VERSIONS[old.table]] for old in tables}}
        changed = replace(manifest, files={**manifest.files, **entries}, facts=facts)
        write_in_one_step(ref.folder / MANIFEST, changed.to_json().encode())
        for old in tables:
            crash_point("before_replace", old.table)
            os.replace(staging / old.path.name, old.path)
        flush(ref.folder)
        shutil.rmtree(staging)


def _stepped(old: OldTable) -> pa.Table:
    table = pq.read_table(old.path, partitioning=None)
    for version in range(old.version, VERSIONS[old.table]):
        table = STEPS[old.table, version](table)
    return table
