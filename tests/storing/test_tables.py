"""Rows to Parquet and back, the catalog over them, and the documentation of both."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactRef
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import QueryFailed, SchemaMismatch
from storage.images import decode_image, encode_image
from storage.layout import Workspace
from storage.schemas import TABLES, document, schema
from storage.tables import read_images, read_rows, to_table, write_rows


def values(kind: pa.DataType) -> st.SearchStrategy[Any]:
    if pa.types.is_string(kind):
        return st.text(st.characters(codec="utf-8"), max_size=20)
    if pa.types.is_integer(kind):
        return st.integers(-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_binary(kind):
        return st.binary(max_size=50)
    if pa.types.is_map(kind):
        return st.dictionaries(values(kind.key_type), values(kind.item_type), max_size=3)
    if pa.types.is_list(kind):
        return st.lists(values(kind.value_type), max_size=3)
    return st.fixed_dictionaries({field.name: values(field.type) for field in kind})


def rows_of(name: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    columns = {
        field.name: st.none() | values(field.type) if field.nullable else values(field.type) for field in schema(name)
    }
    return st.lists(st.fixed_dictionaries(columns), max_size=4)


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_rows_come_back_as_they_were(name: str, data: st.DataObject) -> None:
    rows = data.draw(rows_of(name))
    found = to_table(name, rows).to_pylist(maps_as_pydicts="strict")
    assert canonical(found) == canonical(rows)


def canonical(value: Any) -> str:
    """Text that compares nan with nan, whatever the order of keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {canonical(value[key])}" for key in sorted(value)) + "}"
    return "[" + ", ".join(map(canonical, value)) + "]" if isinstance(value, list) else repr(value)


def commit(workspace: Path, name: str = "refusals", run: str = "run", **changes: Any) -> None:
    row = {"run_id": run, "round": 1, "prompt_id": "p", "reason": "tie", "detail": "d", **changes}
    with staged_artifact(ArtifactRef(str(workspace), run, "populations", f"k{len(run)}")) as folder:
        write_rows(folder, name, [row])


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"run_id": "r", "round": 1, "prompt_id": "p", "reason": "tie", "detail": "ä"}] * 1000
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_rows(folder, "refusals", rows)
    assert (tmp_path / "a/refusals.parquet").read_bytes() == (tmp_path / "b/refusals.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"round": "one"}, "refusals, column round: expected int32"),
        ({"reason": None}, "refusals, column reason: a value is missing"),
        ({"colour": 1}, "refusals has no column colour"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaMismatch, match=message):
        commit(tmp_path, **change)
    assert read_rows(Workspace.open(tmp_path), "run", "refusals") == []


def test_images_are_lossless_and_found_by_id(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    rows = [
        {"sample_id": f"base/p/{i}", "image": encode_image(image), "format": "webp"} for i, image in enumerate(pixels)
    ]
    with staged_artifact(ArtifactRef(str(tmp_path), "run", "samples", "s")) as folder:
        write_rows(folder, "images", rows)
    found = read_images(Workspace.open(tmp_path), "run", ["base/p/3", "base/p/199", "base/p/200"])
    assert set(found) == {"base/p/3", "base/p/199"}
    for place in (3, 199):
        assert (decode_image(found[f"base/p/{place}"]) == pixels[place]).all()


def test_the_catalog_shows_committed_rows_with_comments_and_can_be_moved(tmp_path: Path) -> None:
    old = tmp_path / "old"
    commit(old)
    half = old / "runs/run/populations/half"
    shutil.copytree(old / "runs/run/populations/k3", half)
    (half / "manifest.json").unlink()
    rebuild_catalog(Workspace.open(old))
    question = "SELECT run_id, reason FROM refusals"
    assert query(Workspace.open(old), question).to_pylist() == [{"run_id": "run", "reason": "tie"}]
    old.rename(tmp_path / "new")
    moved = Workspace.open(tmp_path / "new")
    rebuild_catalog(moved)
    assert query(moved, question).num_rows == 1
    comments = query(moved, "SELECT count(*) AS n FROM duckdb_columns() WHERE comment IS NULL AND NOT internal")
    assert comments.to_pylist() == [{"n": 0}]
    for name in TABLES:
        assert query(moved, f"SELECT * FROM {name}").column_names == schema(name).names


@pytest.mark.parametrize(
    "sql",
    [
        "DROP VIEW refusals",
        "CREATE TABLE t AS SELECT 1",
        "COPY refusals TO '/dev/shm/out.csv'",
        "SELECT * FROM read_csv('/etc/hostname')",
        "ATTACH '/dev/shm/x.duckdb'",
        "SELEC",
    ],
)
def test_queries_only_read_the_workspace(tmp_path: Path, sql: str) -> None:
    commit(tmp_path)
    with pytest.raises(QueryFailed, match="refused"):
        query(Workspace.open(tmp_path), sql)


def test_the_documentation_of_tables_is_up_to_date() -> None:
    assert Path("docs/tables.md").read_text() == document()
