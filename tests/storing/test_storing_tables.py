"""Rows of any table come back as they were; the same rows give the same bytes; other rows are refused by name."""

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import SchemaMismatch, WorkspaceTooNew
from storage.layout import Workspace
from storage.schemas import TABLES, VERSIONS, schema
from storage.tables import read_artifact, read_rows, read_table, to_table, write_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values_of(kind: pa.DataType) -> st.SearchStrategy:
    """Every value that a column of the type can hold."""
    if pa.types.is_string(kind):
        return TEXT
    if pa.types.is_integer(kind):
        return st.integers(-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1)
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width)
    if pa.types.is_boolean(kind):
        return st.booleans()
    if pa.types.is_binary(kind):
        return st.binary(max_size=20)
    if pa.types.is_map(kind):
        return st.dictionaries(values_of(kind.key_type), values_of(kind.item_type), max_size=3)
    if pa.types.is_list(kind):
        return st.lists(values_of(kind.value_type), max_size=3)
    assert pa.types.is_struct(kind), f"no values known for {kind}"
    return records_of(list(kind))


def records_of(fields: list[pa.Field]) -> st.SearchStrategy[dict]:
    """With the fields in their order."""
    names = [field.name for field in fields]
    columns = [st.none() | values_of(field.type) if field.nullable else values_of(field.type) for field in fields]
    return st.tuples(*columns).map(lambda values: dict(zip(names, values, strict=True)))


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_rows_come_back_and_their_bytes_are_theirs_alone(tmp_path_factory, name, data):
    rows = data.draw(st.lists(records_of(list(schema(name))), max_size=4))
    folders = [tmp_path_factory.mktemp("round-trip") for _ in range(2)]
    write_rows(folders[0], name, rows)
    write_rows(folders[1], name, to_table(name, rows))
    first, second = ((folder / f"{name}.parquet").read_bytes() for folder in folders)
    assert first == second
    found = pq.read_table(folders[0] / f"{name}.parquet")
    assert found.schema.equals(schema(name))
    assert found.schema.metadata == schema(name).metadata
    assert [field.metadata for field in found.schema] == [field.metadata for field in schema(name)]
    # As text: a NaN equals itself, and -0.0 does not equal 0.0.
    assert repr(found.to_pylist(maps_as_pydicts="strict")) == repr(rows)


def test_numpy_values_are_values():
    row = {"run_id": "a", "stage": "b", "key": "c", "seconds": np.float32(0.5), "items": np.int32(3), "device": "cpu"}
    assert to_table("timings", [row]).to_pylist() == [row | {"ended_at": None, "peak_bytes": None}]
    probabilities = np.array([0.25, 0.75], np.float32)
    columns = {field.name: "x" for field in schema("attributes")} | {"confidence": 0.75}
    table = to_table("attributes", [columns | {"probabilities": probabilities}])
    assert table["probabilities"].to_pylist() == [[0.25, 0.75]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seconds": "fast"}, ["seconds", "double", "'fast'"]),
        ({"items": 2.5}, ["items", "int64", "2.5", "float"]),
        ({"items": math.nan}, ["items", "int64", "nan"]),
        ({"items": 2**70}, ["items", "int64"]),
        ({"items": True}, ["items", "int64", "bool"]),
        ({"stage": 3}, ["stage", "string", "int"]),
        ({"stage": "\ud800"}, ["stage", "string", "surrogates"]),
        ({"device": None}, ["device", "a value is missing", "row 1"]),
        ({"colour": "red"}, ["no column colour", "run_id, stage, key, seconds, items, device"]),
    ],
)
def test_a_row_that_does_not_fit_is_named(timing, change, words):
    with pytest.raises(SchemaMismatch) as caught:
        to_table("timings", [timing(), timing() | change])
    for word in ["table timings", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", ["x", 1.5, None])
def test_a_table_that_does_not_fit_is_named(timing, value):
    table = pa.Table.from_pylist([timing() | {"items": value}])
    reason = "a value is missing" if value is None else "expected int64; the given table has"
    with pytest.raises(SchemaMismatch, match=f"table timings, column items: {reason}"):
        to_table("timings", table)
    with pytest.raises(SchemaMismatch, match="no column colour"):
        to_table("timings", table.rename_columns([*table.column_names[:-1], "colour"]))


def test_an_unknown_table_is_refused(workspace):
    for read in (lambda: schema("tables"), lambda: read_table(workspace, "night-1", "tables")):
        with pytest.raises(SchemaMismatch, match=r"no table 'tables'; there are runs, starts, prompts"):
            read()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_artifacts_is_empty(workspace, name):
    assert read_table(workspace, "night-1", name).schema.equals(schema(name), check_metadata=True)
    assert read_rows(workspace, "night-1", name) == []


@pytest.fixture
def two_shards(workspace: Workspace, timing) -> Workspace:
    for shard in (1, 0):
        ref = ArtifactRef(str(workspace.root), "night-1", "timings", f"shard-{shard}")
        with staged_artifact(ref) as folder:
            write_rows(folder, "timings", [timing(f"{shard}-{index}", seconds=index) for index in range(3)])
    return workspace


def test_shards_are_read_in_the_order_of_their_keys(two_shards):
    keys = [row["key"] for row in read_rows(two_shards, "night-1", "timings")]
    assert keys == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert read_rows(two_shards, "night-2", "timings") == []


def test_reading_in_part(two_shards):
    def keys(**how):
        return [row["key"] for row in read_rows(two_shards, "night-1", "timings", columns=["key"], **how)]

    assert keys(keys=["shard-1", "shard-7"]) == ["1-0", "1-1", "1-2"]
    assert keys(keys=[]) == []
    assert keys(equal={"seconds": 1.0}) == ["0-1", "1-1"]
    assert keys(equal={"seconds": [0.0, 2.0], "stage": "sampling"}, keys=["shard-0"]) == ["0-0", "0-2"]
    assert keys(equal={"stage": "alignment"}) == []
    table = read_table(two_shards, "night-1", "timings", columns=["seconds", "key"], equal={"items": 3})
    assert table.column_names == ["seconds", "key"]
    for wrong in ({"columns": ["colour"]}, {"equal": {"colour": 1}}):
        with pytest.raises(SchemaMismatch, match="no column colour"):
            read_rows(two_shards, "night-1", "timings", **wrong)


MODEL = {
    "run_id": "night-1",
    "model_id": "round-1",
    "parent_model_id": None,
    "objective": "sft",
    "adapter": "lora",
    "round": 1,
    "seed": 5,
    "steps": 3,
    "beta": 1.0,
    "natural_beta": None,
    "base_model": "emoji",
    "base_digest": "0123456789abcdef",
    "config_digest": None,
    "data_run_id": None,
    "repeats_model_id": None,
}


def commit_model(ref: ArtifactRef, drop: str = "", version: int = VERSIONS["models"]) -> ArtifactRef:
    """A `models` file as another version of the program would have written it."""
    ref = replace(ref, table="models", key=f"without-{drop}")
    table = to_table("models", [MODEL])
    kept = table.select([column for column in table.column_names if column != drop])
    with staged_artifact(ref) as folder:
        marked = kept.replace_schema_metadata({"table": "models", "version": str(version)})
        pq.write_table(marked, folder / "models.parquet")
    return ref


def test_null_may_be_asked_for(workspace, ref):
    commit_model(ref)
    assert len(read_rows(workspace, "night-1", "models", equal={"natural_beta": None})) == 1
    assert read_rows(workspace, "night-1", "models", equal={"objective": None}) == []


def test_older_files_are_read_where_only_nullable_columns_are_new(ref):
    assert read_artifact(commit_model(ref, "natural_beta"), "models") == [MODEL]
    with pytest.raises(SchemaMismatch, match=r"column seed: a value is missing.*without-seed.*, 1 of 1 rows"):
        read_artifact(commit_model(ref, "seed"), "models")


def test_newer_files_are_refused(workspace, ref):
    commit_model(ref, version=VERSIONS["models"] + 1)
    known = VERSIONS["models"]
    with pytest.raises(
        WorkspaceTooNew, match=rf"models\.parquet has version {known + 1} of table models.*up to {known}"
    ):
        read_table(workspace, "night-1", "models")
