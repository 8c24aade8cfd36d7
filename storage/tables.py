"""Rows to Parquet and back. The same rows give the same bytes."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.artifacts import ArtifactRef, committed_folders, is_committed, require_present
from storage.errors import CorruptArtifact, NotCommitted, SchemaMismatch, WorkspaceTooNew
from storage.layout import Workspace
from storage.schemas import FOLDER, VERSIONS, schema

Row = Mapping[str, Any]
OF_BYTES = ("images", "latents")
ROW_GROUP = 64
# Bytes that are compressed already, or cannot be; small row groups make a single image cheap to read.
_BYTES_SETTINGS = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": ["sample_id"],  # the least and the greatest image would be stored again
}
_SETTINGS = {"compression": "zstd", "compression_level": 3}


def to_table(name: str, rows: Sequence[Row] | pa.Table) -> pa.Table:
    """Checked against the schema. Raises: SchemaMismatch naming table, column, expected type and what came."""
    expected = schema(name)
    if isinstance(rows, pa.Table):
        table = cast("pa.Table", rows)
        _refuse_more(name, expected, table.column_names)
        return _conform(table, name, expected, "the given table")
    plain = cast("Sequence[Row]", rows)
    _refuse_more(name, expected, {column for row in plain for column in row})
    columns = [_column(name, field, [row.get(field.name) for row in plain]) for field in expected]
    return pa.Table.from_arrays(columns, schema=expected)


def write_rows(folder: Path, name: str, rows: Sequence[Row] | pa.Table) -> None:
    """Writes `<name>.parquet` into a staged folder. Raises: SchemaMismatch."""
    settings = {**_BYTES_SETTINGS, "row_group_size": ROW_GROUP} if name in OF_BYTES else _SETTINGS
    path = folder / f"{name}.parquet"
    pq.write_table(to_table(name, rows), path, version="2.6", write_page_checksum=True, **settings)


class RowWriter:
    """Writes a table of bytes as its rows come, in one thread: the file is the one that `write_rows` would write."""

    def __init__(self, folder: Path, name: str):
        """name: images or latents."""
        self._name, self._waiting, self._written = name, cast("list[Row]", []), False
        path = folder / f"{name}.parquet"
        self._file = pq.ParquetWriter(path, schema(name), version="2.6", write_page_checksum=True, **_BYTES_SETTINGS)

    def add(self, rows: Iterable[Row]) -> None:
        """Further rows. Raises: SchemaMismatch."""
        self._waiting += rows
        while len(self._waiting) >= ROW_GROUP:
            self._write(ROW_GROUP)

    def close(self) -> None:
        """Writes what is left, and the end of the file."""
        if self._waiting or not self._written:
            self._write(len(self._waiting))
        self._file.close()

    def _write(self, count: int) -> None:
        rows, self._waiting = self._waiting[:count], self._waiting[count:]
        self._file.write_table(to_table(self._name, rows), ROW_GROUP)
        self._written = True


def shard_paths(
    workspace: Workspace, name: str, run_id: str | None = None, keys: Iterable[str] | None = None
) -> list[str]:
    """Committed files of a table, of one run or of all, by run and key. keys: of these artifacts only."""
    runs = workspace.run_ids() if run_id is None else [run_id]
    wanted = None if keys is None else set(keys)
    folders = [folder for run in runs for folder in committed_folders(workspace, run, FOLDER.get(name, name))]
    paths = (f"{folder}/{name}.parquet" for folder in folders if wanted is None or os.path.basename(folder) in wanted)
    return [path for path in paths if os.path.isfile(path)]


def read_table(
    workspace: Workspace,
    run_id: str,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    equal: Mapping[str, Any] | None = None,
    keys: Iterable[str] | None = None,
) -> pa.Table:
    """All committed rows of a run's table, in the order of artifacts' keys; none gives an empty table.

    columns: these only. equal: rows whose columns have these values (a list: any of them; None: null). keys: of these
    artifacts only. Raises: CorruptArtifact, SchemaMismatch, WorkspaceTooNew.
    """
    return _read(shard_paths(workspace, name, run_id, keys), name, columns, equal or {})


def read_rows(
    workspace: Workspace,
    run_id: str,
    name: str,
    *,
    columns: Sequence[str] | None = None,
    equal: Mapping[str, Any] | None = None,
    keys: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Like `read_table`, as plain values; map columns as dicts."""
    table = read_table(workspace, run_id, name, columns=columns, equal=equal, keys=keys)
    return table.to_pylist(maps_as_pydicts="strict")


def read_artifact(ref: ArtifactRef, name: str) -> list[dict[str, Any]]:
    """Rows of one artifact's table. Raises: NotCommitted, RemovedArtifact, CorruptArtifact."""
    path = ref.folder / f"{name}.parquet"
    if not is_committed(ref) or not path.is_file():
        require_present(ref, path.name)
        raise NotCommitted(
            f"{ref.table}/{ref.key} of run {ref.run_id} in {ref.workspace} has no committed {name}; run its stage "
            "first."
        )
    return _read([str(path)], name, None, {}).to_pylist(maps_as_pydicts="strict")


def known_version(stored: pa.Schema, name: str, path: str) -> int:
    """Version of the table that a file holds. Raises: WorkspaceTooNew if it is above this program's."""
    marks = cast("dict[bytes, bytes]", stored.metadata or {})
    version = int(marks.get(b"version", b"1"))
    if version > VERSIONS[name]:
        raise WorkspaceTooNew(
            f"{path} has version {version} of table {name}; this program knows up to {VERSIONS[name]}. Update "
            "popalign, or choose another --workspace."
        )
    return version


def read_file(path: str, name: str) -> pa.Table:
    """All rows of a committed file, in today's columns. Raises: CorruptArtifact, SchemaMismatch, WorkspaceTooNew."""
    return _read_file(path, name, schema(name), {})


def read_images(
    workspace: Workspace, run_id: str, sample_ids: Iterable[str], keys: Iterable[str] | None = None
) -> dict[str, bytes]:
    """Stored bytes of the given images; those not committed are absent, and those that were removed.

    Reads only the row groups that hold them. keys: of these artifacts only. Raises: CorruptArtifact.
    """
    return dict(stream_images(workspace, run_id, sample_ids, keys))


def stream_images(
    workspace: Workspace, run_id: str, sample_ids: Iterable[str], keys: Iterable[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """As `read_images`, one row group after another, in the order in which they are stored."""
    wanted = set(sample_ids)
    for path in shard_paths(workspace, "images", run_id, keys):
        if not wanted:
            break
        found = set[str]()
        for sample, image in _images_in(path, wanted):
            found.add(sample)
            yield sample, image
        wanted -= found


def _images_in(path: str, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            ids = cast("list[str]", file.read(["sample_id"])["sample_id"].to_pylist())
            hits = [row for row, sample in enumerate(ids) if sample in wanted]
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            for group in np.unique(np.searchsorted(np.cumsum(sizes), hits, side="right")).tolist():
                table = file.read_row_groups([group], ["sample_id", "image"])
                pairs = zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True)
                yield from [(sample, image) for sample, image in pairs if sample in wanted]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, "images", error) from error


def _read(paths: Sequence[str], name: str, columns: Sequence[str] | None, equal: Mapping[str, Any]) -> pa.Table:
    whole = schema(name)
    _refuse_more(name, whole, {*(columns or ()), *equal})
    kept = list(columns) if columns is not None else whole.names
    needed = pa.schema([whole.field(column) for column in dict.fromkeys([*kept, *equal])], whole.metadata)
    parts = [_read_file(path, name, needed, equal) for path in paths]
    table = pa.concat_tables(parts) if parts else needed.empty_table()
    return table.select(kept)


def _read_file(path: str, name: str, needed: pa.Schema, equal: Mapping[str, Any]) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            stored = file.schema_arrow
            version = known_version(stored, name, path)
            table = file.read([column for column in needed.names if column in stored.names])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, name, error) from error
    try:
        table = _conform(table, name, needed, path)
    except SchemaMismatch as error:
        if version == VERSIONS[name]:
            raise
        raise SchemaMismatch(
            f"{error} The file has version {version} of the table, and this program writes version {VERSIONS[name]}: "
            "`popalign migrate` takes a workspace to the current versions."
        ) from error
    for column, value in equal.items():
        table = table.filter(_matches(column, value))
    return table


def _matches(column: str, value: Any) -> Any:
    if value is None:
        return pc.field(column).is_null()
    if isinstance(value, list | tuple | set):
        return pc.field(column).isin(list(cast("Iterable[Any]", value)))
    return pc.field(column) == value


def _conform(table: pa.Table, name: str, expected: pa.Schema, source: str) -> pa.Table:
    """The table with exactly the expected columns; a missing one is null where that is allowed."""
    columns: list[pa.ChunkedArray] = []
    for field in expected:
        if field.name in table.column_names:
            column = table[field.name]
            try:
                column = column if column.type == field.type else column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise _mismatch(name, field, f"{source} has {column.type}: {error}") from error
        else:
            column = pa.chunked_array([pa.nulls(len(table), field.type)])
        if not field.nullable and column.null_count:
            raise _missing(name, field, f"{source}, {column.null_count} of {len(table)} rows")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=expected)


def _refuse_more(name: str, expected: pa.Schema, columns: Iterable[str]) -> None:
    if unknown := sorted(set(columns) - set(expected.names)):
        raise SchemaMismatch(f"table {name} has no column {', '.join(unknown)}; it has {', '.join(expected.names)}.")


def _column(name: str, field: pa.Field, values: list[Any]) -> pa.Array:
    missing = next((row for row, value in enumerate(values) if value is None), None)
    if missing is not None and not field.nullable:
        raise _missing(name, field, f"row {missing}")
    if pa.types.is_integer(field.type):
        # Arrow would cut a fraction off.
        fractions = (v for v in values if isinstance(v, Real) and not float(v).is_integer())
        if (fraction := next(fractions, None)) is not None:
            raise _mismatch(name, field, f"got {fraction} of type {type(fraction).__name__}")
    try:
        return pa.array(values, type=field.type)
    except (ValueError, TypeError, OverflowError) as error:
        raise _mismatch(name, field, str(error)) from error


def _mismatch(name: str, field: pa.Field, got: str) -> SchemaMismatch:
    return SchemaMismatch(f"table {name}, column {field.name}: expected {field.type}; {got}.")


def _missing(name: str, field: pa.Field, where: str) -> SchemaMismatch:
    return SchemaMismatch(f"table {name}, column {field.name}: a value is missing and may not be ({where}).")


def unreadable(path: str, name: str, error: Exception) -> CorruptArtifact:
    """What to raise for a committed file that Arrow cannot read."""
    return CorruptArtifact(
        f"{path} is not readable as table {name} ({error}). Remove {os.path.dirname(path)} and run again with the same "
        "run id."
    )
