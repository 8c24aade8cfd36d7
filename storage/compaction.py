"""Many small committed files copied into few large ones, which only the catalog reads.

.compacted/index.json              which files count, and what each was made of; replaced in one step
.compacted/<table>.<name>.parquet  a segment: rows of many runs, by run

Shards stay as they are: a segment is a copy that queries are quick with, and may be removed at any time. It counts
while each folder that it was made of is as it was then; the bytes of images are not copied.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from storage.artifacts import MANIFEST, committed_folders
from storage.disk import disk_errors, flush, make_folder, write_in_one_step
from storage.layout import Workspace
from storage.locks import exclusive
from storage.schemas import FOLDER, TABLES, VERSIONS, schema
from storage.tables import read_file, shard_paths

FOLDER_NAME = ".compacted"
INDEX = "index.json"
# Fewer files of a table are left as they are; so many segments are made into one.
FEWEST_FILES, MOST_SEGMENTS = 16, 8
ROWS_A_GROUP = 122_880
YOUNGEST_NS = 1_000_000_000
# An open catalog names old segments, so they stay for readers that began before.
GRACE_SECONDS = 24 * 3600.0
NOT_COPIED = ("images",)
Sources = Mapping[str, int]


@dataclass(frozen=True)
class Segment:
    """One file. sources: run -> when the folder of its table was last changed, in ns. version: of the table."""

    table: str
    name: str
    version: int
    sources: Sources


def current_segments(workspace: Workspace) -> list[Segment]:
    """Those that hold exactly what is committed in the folders that they were made of."""
    stamps: dict[tuple[str, str], int | None] = {}

    def unchanged(run_id: str, table: str, stamp: int) -> bool:
        key = (run_id, FOLDER.get(table, table))
        if key not in stamps:
            stamps[key] = _stamp(workspace, *key)
        return stamps[key] == stamp

    folder = workspace.root / FOLDER_NAME
    return [
        segment
        for segment in _read_index(workspace)
        if segment.version == VERSIONS.get(segment.table)
        and (folder / segment.name).is_file()
        and all(unchanged(run_id, segment.table, stamp) for run_id, stamp in segment.sources.items())
    ]


def files_of(workspace: Workspace, table: str, segments: Iterable[Segment], run_ids: Iterable[str]) -> list[str]:
    """Files that hold all committed rows of a table, each row once: segments, then what is in none.

    run_ids: all of the workspace.
    """
    mine = [segment for segment in segments if segment.table == table]
    covered = {run_id for segment in mine for run_id in segment.sources}
    loose = [run_id for run_id in run_ids if run_id not in covered]
    paths = [str(workspace.root / FOLDER_NAME / segment.name) for segment in mine]
    return paths + [path for run_id in loose for path in shard_paths(workspace, table, run_id)]


def compact(workspace: Workspace) -> list[Segment]:
    """Copies what lies in many files of decided runs; returns what counts then. Readers and writers go on meanwhile.

    Raises: CorruptArtifact for a file that is not readable; StorageFull.
    """
    folder = workspace.root / FOLDER_NAME
    with exclusive(workspace.root / ".compacted.lock"), disk_errors(folder):
        make_folder(folder)
        before = current_segments(workspace)
        # One run that goes on would make a segment of many useless.
        decided = [run for run in workspace.run_ids() if committed_folders(workspace, run, "decisions")]
        after: list[Segment] = []
        for table in TABLES:
            if table not in NOT_COPIED:
                mine = [segment for segment in before if segment.table == table]
                after += _compacted(workspace, table, mine, decided)
        _write_index(workspace, after)
        _remove_old(folder, {segment.name for segment in after})
    return after


def _compacted(workspace: Workspace, table: str, segments: list[Segment], run_ids: list[str]) -> list[Segment]:
    covered = {run_id for segment in segments for run_id in segment.sources}
    sources: dict[str, int] = {}
    files = 0
    for run_id in (run_id for run_id in run_ids if run_id not in covered):
        stamp = _stamp(workspace, run_id, FOLDER.get(table, table))
        # A change right after this one might have the same time.
        if stamp is not None and time.time_ns() - stamp > YOUNGEST_NS:
            sources[run_id] = stamp
            files += len(shard_paths(workspace, table, run_id))
    if files < FEWEST_FILES:
        return segments
    if len(segments) + 1 > MOST_SEGMENTS:
        merged = dict(sources)
        for segment in segments:
            merged |= segment.sources
        return [_write(workspace, table, merged, segments)]
    return [*segments, _write(workspace, table, sources, [])]


def _write(workspace: Workspace, table: str, sources: Sources, segments: list[Segment]) -> Segment:
    """Rows of all sources in one file, run by run; of those that a segment has, from there."""
    folder = workspace.root / FOLDER_NAME
    segment = Segment(table, f"{table}.{uuid.uuid4().hex[:12]}.parquet", VERSIONS[table], dict(sorted(sources.items())))
    draft = folder / f".{segment.name}~"
    try:
        with pq.ParquetWriter(draft, schema(table), compression="zstd", compression_level=3) as writer:
            for rows in _large_groups(_rows(workspace, table, segment.sources, segments)):
                writer.write_table(rows, row_group_size=ROWS_A_GROUP)
        flush(draft)
        os.replace(draft, folder / segment.name)
    finally:
        draft.unlink(missing_ok=True)
    flush(folder)
    return segment


def _rows(workspace: Workspace, table: str, sources: Sources, segments: list[Segment]) -> Iterator[pa.Table]:
    for segment in segments:
        with pq.ParquetFile(workspace.root / FOLDER_NAME / segment.name) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)
    done = {run_id for segment in segments for run_id in segment.sources}
    for run_id in (run_id for run_id in sources if run_id not in done):
        for path in shard_paths(workspace, table, run_id):
            yield read_file(path, table)


def _large_groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = 0
    for part in parts:
        waiting.append(part)
        rows += len(part)
        if rows >= ROWS_A_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _stamp(workspace: Workspace, run_id: str, folder: str) -> int | None:
    """When a folder of artifacts was last changed; None where there is none, or a folder in it is not committed yet.

    An artifact's folder gets its name before its manifest, which changes the time of the inner folder alone.
    """
    path = f"{workspace.runs}/{run_id}/{folder}"
    try:
        stamp = os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return None
    key = (path, stamp)
    if key not in _whole:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
        if not all(os.path.exists(f"{path}/{name}/{MANIFEST}") for name in names):
            return None
        _whole.add(key)
    return stamp


# Folders that were seen with a manifest in each, by path and time of change: the next look needs one call.
_whole: set[tuple[str, int]] = set()


def _read_index(workspace: Workspace) -> list[Segment]:
    try:
        values = cast("list[dict[str, Any]]", json.loads((workspace.root / FOLDER_NAME / INDEX).read_text()))
        return [Segment(v["table"], v["name"], int(v["version"]), dict(v["sources"])) for v in values]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []  # a copy that nobody can use is no loss


def _write_index(workspace: Workspace, segments: list[Segment]) -> None:
    values = [{"table": s.table, "name": s.name, "version": s.version, "sources": dict(s.sources)} for s in segments]
    write_in_one_step(workspace.root / FOLDER_NAME / INDEX, (json.dumps(values) + "\n").encode())


def _remove_old(folder: Path, kept: set[str]) -> None:
    for path in folder.glob("*.parquet"):
        if path.name not in kept and time.time() - path.stat().st_mtime > GRACE_SECONDS:
            path.unlink(missing_ok=True)
    for path in folder.glob(".*~"):
        path.unlink(missing_ok=True)


def remove_compacted(workspace: Workspace) -> None:
    """Removes all copies; queries read the shards again."""
    with exclusive(workspace.root / ".compacted.lock"):
        shutil.rmtree(workspace.root / FOLDER_NAME, ignore_errors=True)
