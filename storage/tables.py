"""Rows to Parquet and back. The same rows give the same bytes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.artifacts import ArtifactRef, committed_keys
from storage.errors import CorruptArtifact, SchemaMismatch
from storage.layout import Workspace
from storage.schemas import schema

Row = Mapping[str, Any]
# Tables that lie in another table's artifacts, written in the same commit.
FOLDER = {
    "images": "samples",
    "preferences": "populations",
    "refusals": "populations",
    "yields": "populations",
    "training_steps": "models",
    "group_shares": "disparities",
    "comparisons": "disparities",
    "scores": "disparities",
}


def to_table(name: str, rows: Sequence[Row]) -> pa.Table:
    """Checked against the schema. Raises: SchemaMismatch naming table, column, value and type."""
    expected = schema(name)
    columns: list[pa.Array[Any]] = []
    for field in expected:
        values = [row.get(field.name) for row in rows]
        if not field.nullable and any(value is None for value in values):
            raise SchemaMismatch(f"table {name}, column {field.name}: a value is missing and may not be.")
        try:
            columns.append(pa.array(values, type=field.type))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise SchemaMismatch(f"table {name}, column {field.name}: expected {field.type}; {error}") from error
    known = set(expected.names)
    for row in rows:
        if extra := set(row) - known:
            raise SchemaMismatch(f"table {name} has no column {', '.join(sorted(extra))}; it has {', '.join(known)}.")
    return pa.Table.from_arrays(columns, schema=expected)


def write_rows(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Writes `<name>.parquet` into a staged folder."""
    table = to_table(name, rows)
    if name == "images":
        # The bytes are compressed already; small row groups make a single image cheap to read.
        pq.write_table(table, folder / f"{name}.parquet", compression="none", use_dictionary=False, row_group_size=64)
    else:
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd", version="2.6")


def shard_paths(workspace: Workspace, name: str, run_id: str | None = None) -> list[Path]:
    """Committed files of a table, of one run or of all."""
    runs = workspace.run_ids() if run_id is None else [run_id]
    refs = [ref for run in runs for ref in committed_keys(workspace, run, FOLDER.get(name, name))]
    return [path for ref in refs if (path := ref.folder / f"{name}.parquet").is_file()]


def read_table(workspace: Workspace, run_id: str, name: str, *, equal: Mapping[str, Any] | None = None) -> pa.Table:
    """All committed rows of a run's table, with the given columns equal to the given values."""
    return _read(shard_paths(workspace, name, run_id), name, equal)


def read_artifact(ref: ArtifactRef, name: str) -> list[dict[str, Any]]:
    """Rows of one artifact's table."""
    return _read([ref.folder / f"{name}.parquet"], name, None).to_pylist(maps_as_pydicts="strict")


def read_rows(
    workspace: Workspace, run_id: str, name: str, *, equal: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Like `read_table`, as plain values; map columns as dicts."""
    return read_table(workspace, run_id, name, equal=equal).to_pylist(maps_as_pydicts="strict")


def read_images(workspace: Workspace, run_id: str, sample_ids: Iterable[str]) -> dict[str, bytes]:
    """Stored bytes of the given images; those not committed are absent."""
    wanted = pa.array(list(dict.fromkeys(sample_ids)), type=pa.string())
    found: dict[str, bytes] = {}
    for path in shard_paths(workspace, "images", run_id):
        if len(found) == len(wanted):
            break
        ids = pq.read_table(path, columns=["sample_id"])["sample_id"]
        if not pc.any(pc.is_in(ids, value_set=wanted)).as_py():
            continue
        table = pq.read_table(path, filters=pc.field("sample_id").isin(wanted))
        names = cast("list[str]", table["sample_id"].to_pylist())
        found.update(zip(names, cast("list[bytes]", table["image"].to_pylist()), strict=True))
    return found


def _read(paths: Sequence[Path], name: str, equal: Mapping[str, Any] | None) -> pa.Table:
    expected = schema(name)
    condition = None
    for column, value in (equal or {}).items():
        part = pc.field(column) == value
        condition = part if condition is None else condition & part
    parts: list[pa.Table] = []
    for path in paths:
        try:
            parts.append(pq.read_table(path, filters=condition).cast(expected))
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise CorruptArtifact(
                f"{path} is not readable as table {name}: {error}. Remove its folder and run again with the same id."
            ) from error
    return pa.concat_tables(parts) if parts else expected.empty_table()
