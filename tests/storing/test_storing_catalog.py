"""The DuckDB catalog: any client opens it, it holds what is committed, and it only reads."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from storage.artifacts import ArtifactRef
from storage.catalog import VIEW, query, rebuild_catalog
from storage.commit import staged_artifact
from storage.errors import QueryFailed
from storage.layout import Workspace
from storage.macros import MACROS, SCALARS
from storage.schemas import FOLDER, TABLES, schema
from storage.tables import to_table, write_rows

TOTAL = "SELECT run_id, count(*) AS n, sum(seconds) AS seconds FROM timings GROUP BY run_id ORDER BY run_id"


def commit_timings(workspace: Workspace, timing, run_id: str, seconds: float) -> ArtifactRef:
    ref = ArtifactRef(str(workspace.root), run_id, "timings", "shard-0")
    with staged_artifact(ref) as folder:
        write_rows(folder, "timings", [timing(seconds=seconds) | {"run_id": run_id}] * 2)
    return ref


def fill(root: Path, timing) -> Workspace:
    # The quote in the path must not end a string of the view.
    workspace = Workspace.open(root / "it's here")
    for run_id, seconds in (("night-1", 1.0), ("night-2", 4.0)):
        commit_timings(workspace, timing, run_id, seconds)
    abandoned = ArtifactRef(str(workspace.root), "night-2", "timings", "shard-1").folder
    abandoned.mkdir()
    write_rows(abandoned, "timings", [timing()])
    rebuild_catalog(workspace)
    return workspace


@pytest.fixture
def filled(tmp_path, timing) -> Workspace:
    return fill(tmp_path, timing)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory, timing) -> Workspace:
    """For tests that only query."""
    return fill(tmp_path_factory.mktemp("unchanged"), timing)


NUMBERS = [{"run_id": "night-1", "n": 2, "seconds": 2.0}, {"run_id": "night-2", "n": 2, "seconds": 8.0}]


def test_all_runs_are_seen_and_nothing_unfinished(unchanged):
    assert query(unchanged, TOTAL).to_pylist() == NUMBERS
    assert sorted(path.name for path in unchanged.root.iterdir()) == [
        ".catalog.lock",
        "catalog.duckdb",
        "runs",
        "workspace.json",
    ]


def test_any_client_opens_it_from_any_folder(unchanged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with duckdb.connect(unchanged.catalog, read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM timings").fetchall() == [(4,)]


def test_every_table_is_a_view_with_its_columns_and_comments(unchanged):
    views = query(unchanged, "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").to_pylist()
    comments = {row["view_name"]: row["comment"] for row in views}
    assert comments.pop(VIEW)
    assert comments == {name: text for name, (text, _) in TABLES.items()}
    columns = query(
        unchanged,
        f"SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal AND table_name <> '{VIEW}'",
    ).to_pylist()
    comments = {(row["table_name"], row["column_name"]): row["comment"] for row in columns}
    # Images and latents are stored without their run.
    assert set(comments) == {(name, column) for name in TABLES for column in ("run_id", *schema(name).names)}
    assert comments["timings", "seconds"] == "wall time [s]"
    assert comments["timings", "stage"] == "stage"
    assert all(comments.values())


def test_every_macro_says_what_it_answers_and_nothing_where_nothing_is_committed(workspace):
    macros = query_after_rebuild(workspace, "SELECT function_name, comment FROM duckdb_functions() WHERE NOT internal")
    assert {row["function_name"]: row["comment"] for row in macros} == {
        name: macro.comment for name, macro in MACROS.items()
    } | {name: comment for name, (_, comment, _) in SCALARS.items()}
    for name, macro in MACROS.items():
        wanted = [part for part in macro.parameters.split(",") if part and ":=" not in part]
        assert query(workspace, f"FROM {name}({', '.join(['NULL'] * len(wanted))})").num_rows == 0


def test_gpu_hours_count_every_process_of_a_training_and_no_cpu(workspace, timing):
    hours = {"cpu": None, "2 x cpu": None, "cuda": 0.5, "4 x cuda": 2.0, "mps": 0.5, "16 x cuda": 8.0}
    rows = [timing(key=device, seconds=900.0) | {"device": device} for device in hours for _ in range(2)]
    with staged_artifact(ArtifactRef(str(workspace.root), "night-1", "timings", "all")) as folder:
        write_rows(folder, "timings", rows)
    found = query_after_rebuild(workspace, "SELECT device, gpu_hours FROM cost('night-1')")
    assert {row["device"]: row["gpu_hours"] for row in found} == hours


def query_after_rebuild(workspace: Workspace, sql: str) -> list[dict]:
    rebuild_catalog(workspace)
    return query(workspace, sql).to_pylist()


def test_images_know_their_run(workspace):
    for run_id in ("night-1", "night-2"):
        with staged_artifact(ArtifactRef(str(workspace.root), run_id, "samples", "base.evaluation.00000")) as folder:
            write_rows(folder, "images", [{"sample_id": "base/p/0", "image": run_id.encode(), "format": "webp"}])
    found = query_after_rebuild(workspace, "SELECT run_id, image FROM images ORDER BY run_id")
    assert found == [{"run_id": run_id, "image": run_id.encode()} for run_id in ("night-1", "night-2")]


def described(connection: duckdb.DuckDBPyConnection) -> list[tuple]:
    columns = "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal"
    return connection.execute(f"{columns} AND table_name <> '{VIEW}' ORDER BY table_name, column_index").fetchall()


def test_columns_keep_their_order_and_types_with_and_without_files(workspace):
    with duckdb.connect() as connection:
        for name in TABLES:
            connection.register("expected", schema(name).empty_table())
            run = "" if "run_id" in schema(name).names else "CAST(NULL AS VARCHAR) AS run_id, "
            connection.execute(f'CREATE TABLE "{name}" AS SELECT {run}* FROM expected')
        connection.unregister("expected")
        expected = described(connection)
    with duckdb.connect(rebuild_catalog(workspace), read_only=True) as connection:
        assert described(connection) == expected
        assert [connection.execute(f"SELECT * FROM {name}").fetchall() for name in TABLES] == [[]] * len(TABLES)
    for folder in {FOLDER.get(name, name) for name in TABLES}:
        with staged_artifact(ArtifactRef(str(workspace.root), "night-1", folder, "all")) as staged:
            for name in (name for name in TABLES if FOLDER.get(name, name) == folder):
                write_rows(staged, name, [])
    with duckdb.connect(rebuild_catalog(workspace), read_only=True) as connection:
        assert described(connection) == expected


def test_files_of_an_older_version_are_seen_with_nulls(workspace, ref):
    row = {"run_id": "night-1", "model_id": "m", "objective": "sft", "adapter": "lora", "round": 1, "seed": 1}
    table = to_table("models", [row | {"steps": 1, "beta": 1.0, "natural_beta": 0.5}])
    for key, kept in (("new", table), ("old", table.drop_columns(["natural_beta"]))):
        with staged_artifact(ArtifactRef(ref.workspace, "night-1", "models", key)) as folder:
            pq.write_table(kept, folder / "models.parquet")
    found = query(workspace, "SELECT natural_beta FROM models ORDER BY ALL").to_pylist()
    assert found == [{"natural_beta": 0.5}, {"natural_beta": None}]


def test_a_moved_workspace_gives_the_same_numbers_after_a_rebuild(filled, tmp_path):
    moved = Workspace(tmp_path / "elsewhere")
    shutil.move(filled.root, moved.root)
    with pytest.raises(QueryFailed, match=r"moved, rebuild"):
        query(moved, TOTAL)
    rebuild_catalog(moved)
    assert query(moved, TOTAL).to_pylist() == NUMBERS


def test_a_reader_is_in_nobodys_way(filled, timing):
    with duckdb.connect(filled.catalog, read_only=True) as reader:
        rebuild_catalog(filled)
        commit_timings(filled, timing, "night-3", 0.5)
        rebuild_catalog(filled)
        assert reader.execute("SELECT count(*) FROM timings").fetchall() == [(4,)]
        assert len(query(filled, TOTAL)) == 3


def test_threads_query_and_rebuild_at_once(filled):
    def work(index: int):
        if index % 4 == 0:
            rebuild_catalog(filled)
        return query(filled, TOTAL).to_pylist()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(12))) == [NUMBERS] * 12


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 AS x",
        "FROM timings",
        "WITH t AS (SELECT 1) SELECT * FROM t;",
        "-- why\n SELECT 1",
        "DESCRIBE timings",
        "SUMMARIZE timings",
        "SHOW TABLES",
        "EXPLAIN SELECT * FROM timings",
        "/* a */ EXPLAIN ANALYZE SELECT * FROM timings",
        "EXPLAIN (FORMAT json) SELECT 1",
        "PIVOT timings ON stage USING sum(seconds)",
        "VALUES (1)",
    ],
)
def test_reading_statements_run(unchanged, sql):
    assert len(query(unchanged, sql)) >= 1


@pytest.mark.parametrize(
    "sql",
    [
        "COPY timings TO '{root}/x.csv'",
        "COPY (PIVOT timings ON stage USING sum(seconds)) TO '{root}/x.csv'",
        "EXPLAIN ANALYZE COPY timings TO '{root}/x.csv'",
        "EXPLAIN (ANALYZE) COPY timings TO '{root}/x.csv'",
        "EXPLAIN (FORMAT json, ANALYZE) COPY timings TO '{root}/x.csv'",
        "EXPLAIN EXPLAIN ANALYZE COPY timings TO '{root}/x.csv'",
        "EXPLAIN /* a */ ANALYZE COPY timings TO '{root}/x.csv'",
        "FROM query('COPY timings TO ''{root}/x.csv''')",
        "SELECT 1; COPY timings TO '{root}/x.csv'",
        "EXPORT DATABASE '{root}/x'",
        "ATTACH '{root}/x.duckdb'",
        "DETACH workspace",
        "INSTALL httpfs",
        "LOAD httpfs",
        "CREATE TABLE workspace.x (a INT)",
        "CREATE TEMP TABLE x (a INT)",
        "CREATE TABLE x AS PIVOT timings ON stage USING sum(seconds)",
        "INSERT INTO timings VALUES (1)",
        "DELETE FROM timings",
        "DROP VIEW timings",
        "SET threads = 1",
        "PRAGMA database_list",
        "CHECKPOINT",
        "CALL pragma_version()",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_csv('{root}/../x.csv')",
        "SELECT * FROM glob('/etc/*')",
        "SELECT colour FROM timings",
        "SELECT * FROM tables",
        "SELEC 1",
        "",
        "SELECT 1; SELECT 2",
    ],
)
def test_everything_else_is_refused_in_a_few_lines(unchanged, sql):
    def files() -> set[Path]:
        return set(unchanged.root.rglob("*"))

    before, content = files(), unchanged.catalog.read_bytes()
    with pytest.raises(QueryFailed) as caught:
        query(unchanged, sql.format(root=str(unchanged.root).replace("'", "''")))
    assert 1 <= len(str(caught.value).splitlines()) <= 10
    assert "Traceback" not in str(caught.value)
    assert files() == before
    assert unchanged.catalog.read_bytes() == content


def test_a_first_query_makes_the_catalog(workspace):
    assert query(workspace, "SELECT count(*) AS n FROM prompts").to_pylist() == [{"n": 0}]


def test_what_a_killed_rebuild_leaves_is_removed(filled):
    for name in (".catalog.duckdb", ".catalog.duckdb.wal"):
        (filled.root / name).write_bytes(b"half")
    rebuild_catalog(filled)
    assert query(filled, TOTAL).to_pylist() == NUMBERS
    assert not list(filled.root.glob(".catalog.duckdb*"))
