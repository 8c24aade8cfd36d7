"""A query's result as text or as a file."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from storage.disk import disk_errors, write_in_one_step

ResultFormat = Literal["csv", "json", "parquet"]


def result_bytes(table: pa.Table, kind: ResultFormat) -> bytes:
    """The result in UTF-8, or as a Parquet file. Bytes come as base64; lists and maps come in csv as JSON."""
    if kind == "parquet":
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        return stream.getvalue()
    rows = table.to_pylist(maps_as_pydicts="strict")
    if kind == "json":
        lines = ",\n".join(json.dumps(row, default=_plain, ensure_ascii=False) for row in rows)
        return f"[{lines}]\n".encode()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in rows:
        writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue().encode()


def write_result(table: pa.Table, kind: ResultFormat, path: Path) -> None:
    """Writes the file in one step, over an older one. Raises: StorageFull."""
    with disk_errors(path):
        write_in_one_step(path, result_bytes(table, kind))


def _cell(value: Any) -> Any:
    if isinstance(value, list | dict):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return _plain(value) if isinstance(value, bytes) else value


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
