"""Tables of every older version, made here from columns that are written down: migrated, killed in between, refused."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.artifacts import ArtifactRef, read_manifest, verify
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import CorruptArtifact, RunInUse
from storage.layout import Workspace
from storage.locks import run_lock
from storage.migration import STEPS, migrate_run, old_tables
from storage.schemas import FOLDER, VERSIONS, schema
from storage.tables import read_rows

# Columns that came with the version after this one.
ADDED = {
    ("disparities", 1): ["stratum", "null_low", "null_high"],
    ("group_shares", 1): ["interval"],
    ("models", 1): ["base_model", "base_digest", "config_digest", "data_run_id"],
    ("models", 2): ["repeats_model_id"],
    ("populations", 1): ["target"],
    ("seed_summaries", 1): ["sampling", "between", "between_low", "between_high"],
    ("timings", 1): ["ended_at", "peak_bytes"],
    ("training_steps", 1): ["implicit_accuracy", "winner_margin", "loser_margin", "reward", "drawn", "unknown"],
    ("validations", 1): ["quality", "quality_low", "quality_high"],
}
KILLED = """
import sys
from storage.layout import Workspace
from storage.migration import migrate_run
migrate_run(Workspace.open(sys.argv[1]), "r")
"""


def value(kind: pa.DataType, row: int):
    if pa.types.is_string(kind):
        return f"text {row}"
    if pa.types.is_boolean(kind):
        return bool(row % 2)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return row + 1
    return {} if pa.types.is_map(kind) else []


def old_rows(name: str, version: int) -> list[dict]:
    later = {
        column for (table, since), names in ADDED.items() if table == name and since >= version for column in names
    }
    fields = [field for field in schema(name) if field.name not in later]
    rows = [{field.name: value(field.type, row) for field in fields} for row in range(3)]
    if name == "populations":  # one population of three groups
        rows = [{**row, "run_id": "r", "population_id": "p", "axis": "a"} for row in rows]
    return rows


def commit_old(root: Path, name: str, version: int, key: str = "k") -> ArtifactRef:
    rows = old_rows(name, version)
    fields = [schema(name).field(column) for column in rows[0]]
    marks = {"table": name, "version": str(version)}
    ref = ArtifactRef(str(root), "r", FOLDER.get(name, name), key)
    with staged_artifact(ref) as folder:
        table = pa.Table.from_pylist(rows, schema=pa.schema(fields, metadata=marks))
        pq.write_table(table, folder / f"{name}.parquet")
        (folder / "beside.txt").write_text("is left alone")
    return ref


def test_every_older_version_has_a_step_and_a_test() -> None:
    expected = {(name, version) for name, newest in VERSIONS.items() for version in range(1, newest)}
    assert set(STEPS) == expected
    assert set(ADDED) == expected


@pytest.mark.parametrize(("name", "version"), list(ADDED), ids=lambda part: str(part))
def test_a_table_of_that_version_is_rewritten_and_nothing_is_lost(tmp_path: Path, name: str, version: int) -> None:
    ref, place = commit_old(tmp_path, name, version), Workspace.open(tmp_path)
    before = read_rows(place, "r", name)
    (old,) = old_tables(place)
    assert (old.table, old.version, old.rows) == (name, version, 3)

    assert migrate_run(place, "r") == 1

    after = read_rows(place, "r", name)
    kept = list(old_rows(name, version)[0])
    assert [{column: row[column] for column in kept} for row in after] == [
        {column: row[column] for column in kept} for row in before
    ]
    stored = pq.ParquetFile(ref.folder / f"{name}.parquet").schema_arrow
    assert stored.names == schema(name).names
    assert stored.metadata[b"version"] == str(VERSIONS[name]).encode()
    verify(ref)
    assert read_manifest(ref).facts["migrated"] == {name: [version, VERSIONS[name]]}
    assert list(old_tables(place)) == []
    assert migrate_run(place, "r") == 0
    rebuild_catalog(place)
    assert query(place, f"SELECT count(*) AS n FROM {name}").to_pylist() == [{"n": 3}]


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [("group_shares", "interval", "wilson"), ("models", "data_run_id", "text {}"), ("populations", "target", 1 / 3)],
)
def test_what_can_be_told_is_filled_in(tmp_path: Path, name: str, column: str, expected) -> None:
    commit_old(tmp_path, name, 1)
    place = Workspace.open(tmp_path)
    migrate_run(place, "r")
    wanted = [expected.format(row) if isinstance(expected, str) else pytest.approx(expected) for row in range(3)]
    assert [row[column] for row in read_rows(place, "r", name)] == wanted


@pytest.mark.parametrize("point", ["before_replace:timings", "before_replace:group_shares"])
def test_killed_before_a_file_is_replaced_it_goes_on_to_the_same_bytes(tmp_path: Path, point: str) -> None:
    name = point.partition(":")[2]
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for root in (undisturbed, disturbed):
        commit_old(root, name, 1)
    environment = {"POPALIGN_KILL_AT": point, "PYTHONPATH": ":".join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(disturbed)], env=environment, check=False)
    assert killed.returncode == -9
    place = Workspace.open(disturbed)
    ref = ArtifactRef(str(disturbed), "r", FOLDER.get(name, name), "k")
    assert len(read_rows(place, "r", name)) == 3
    with pytest.raises(CorruptArtifact, match="popalign migrate --yes"):
        verify(ref)
    assert migrate_run(place, "r") == 1
    migrate_run(Workspace.open(undisturbed), "r")
    verify(ref)
    path = f"runs/r/{FOLDER.get(name, name)}/k/{name}.parquet"
    assert (disturbed / path).read_bytes() == (undisturbed / path).read_bytes()


def test_a_run_that_is_being_worked_on_is_refused_and_untouched(tmp_path: Path) -> None:
    ref, place = commit_old(tmp_path, "timings", 1), Workspace.open(tmp_path)
    with run_lock(place, "r"), pytest.raises(RunInUse, match="'r'"):
        migrate_run(place, "r")
    assert [old.ref for old in old_tables(place)] == [ref]
