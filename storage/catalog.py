"""One DuckDB file a workspace: views over committed shards, nothing copied; any DuckDB client opens it."""

import os
from pathlib import Path

import duckdb
import pyarrow as pa

from storage.errors import QueryFailed
from storage.layout import Workspace
from storage.schemas import TABLES, schema
from storage.tables import shard_paths


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def rebuild_catalog(workspace: Workspace) -> Path:
    """Writes the catalog anew beside the old one and replaces it: a reader sees the old or the new, never half.

    Views name the committed files, so a half-written shard is never read. Paths are absolute: after moving a
    workspace, rebuild.
    """
    draft = workspace.root / f".catalog-{os.getpid()}.duckdb"
    draft.unlink(missing_ok=True)
    with duckdb.connect(draft) as connection:
        for name, (comment, columns) in TABLES.items():
            paths = shard_paths(workspace, name)
            if paths:
                files = ", ".join(_quoted(str(path)) for path in paths)
                connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{files}])")
            else:
                # An empty table of the right columns: queries work before the stage has run.
                connection.register("empty", schema(name).empty_table())
                connection.execute(f"CREATE TABLE {name} AS SELECT * FROM empty")
                connection.unregister("empty")
            kind = "VIEW" if paths else "TABLE"
            connection.execute(f"COMMENT ON {kind} {name} IS {_quoted(comment)}")
            for column, _, meaning in columns:
                connection.execute(f'COMMENT ON COLUMN {name}."{column.removesuffix("?")}" IS {_quoted(meaning)}')
    os.replace(draft, workspace.catalog)
    return workspace.catalog


def query(workspace: Workspace, sql: str) -> pa.Table:
    """Runs SQL read-only over the committed tables; only files of the workspace can be read.

    Raises: QueryFailed with DuckDB's reason.
    """
    if not workspace.catalog.is_file():
        rebuild_catalog(workspace)
    try:
        with duckdb.connect(workspace.catalog, read_only=True) as connection:
            connection.execute(f"SET allowed_directories = [{_quoted(str(workspace.root))}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            result = connection.sql(sql)
            # Typed as never None; it is for statements without a result.
            return pa.table({}) if result is None else result.to_arrow_table()  # pyright: ignore[reportUnnecessaryComparison]
    except duckdb.Error as error:
        reason = str(error).strip()
        raise QueryFailed(f"the query was refused: {reason}\nTables: {', '.join(TABLES)}. Reading only.") from error
