"""One DuckDB file a workspace: views over committed shards, nothing copied; any DuckDB client opens it."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from storage.columns import RUN, UNITS
from storage.compaction import current_segments, files_of
from storage.disk import disk_errors
from storage.errors import CorruptArtifact, QueryFailed
from storage.layout import Workspace
from storage.locks import exclusive
from storage.macros import MACROS, SCALARS
from storage.registry import REGISTRY
from storage.schemas import TABLES, schema

# duckdb is imported where it is used: Prefect's log thread keeps modules alive past the interpreter's end, and one that
# refers to duckdb then prints pages about leaks at the end of a run.
if TYPE_CHECKING:
    import duckdb

_EXPLAIN = re.compile(r"explain\s+(analyze\s+)?(\((analyze|format)\b[^()]*\)\s*)?", re.IGNORECASE)
_READING = re.compile(r"(select|from|with|pivot|\()", re.IGNORECASE)
_RUN_OF_PATH = "/runs/([^/]+)/[^/]+/[^/]+/[^/]+[.]parquet$"
MESSAGE_LINES = 6
VIEW = "model_registry"
_VIEW_COMMENT = "one row a trained model: what it was made from, what was decided and measured, whether it is promoted"
_VIEW_COLUMNS = {
    "verdict": "promote or hold; null where nothing was decided",
    "reason": "of the verdict, in one sentence",
    "disparities": "mean L2 on held-out neutral prompts before and after, by axis, with the interval of the ratio [1]",
    "promoted": "whether it is the current model",
}
_VIEW_SQL = """CREATE VIEW {view} AS
WITH measured AS (
    SELECT run_id, model_id,
           list({{axis: axis, before: before, after: after,
                 ratio: ratio, ratio_low: ratio_low, ratio_high: ratio_high}} ORDER BY axis) AS disparities
    FROM comparisons WHERE split = 'eval' AND measure = 'l2' GROUP BY ALL
), pointer AS (
    SELECT json_extract_string(TRY_CAST(content AS JSON), '$.current.run_id') AS run_id,
           json_extract_string(TRY_CAST(content AS JSON), '$.current.model_id') AS model_id
    FROM {pointer}
)
SELECT m.run_id, m.model_id, m.parent_model_id, m.round, m.objective, m.adapter, m.seed,
       m.base_model, m.base_digest, m.config_digest, m.data_run_id,
       d.verdict, d.reason, c.disparities, p.run_id IS NOT NULL AS promoted
FROM models AS m
LEFT JOIN decisions AS d USING (run_id, model_id)
LEFT JOIN measured AS c USING (run_id, model_id)
LEFT JOIN pointer AS p USING (run_id, model_id)"""


def rebuild_catalog(workspace: Workspace) -> Path:
    """Writes the catalog anew beside the old one and replaces it: a reader sees the old or the new, never half.

    Views name the committed files, so a half-written shard is never read. Paths are absolute: after moving a
    workspace, rebuild. Raises: CorruptArtifact if a committed file is not readable; StorageFull.
    """
    import duckdb

    draft = workspace.root / ".catalog.duckdb"
    with exclusive(workspace.root / ".catalog.lock"), disk_errors(workspace.catalog):
        for leftover in workspace.root.glob(f"{draft.name}*"):
            leftover.unlink()
        with duckdb.connect(draft) as connection:
            connection.begin()
            segments, run_ids = current_segments(workspace), workspace.run_ids()
            for name in TABLES:
                _create_view(connection, name, files_of(workspace, name, segments, run_ids))
            _create_registry_view(connection, workspace.root / REGISTRY)
            _create_macros(connection)
            connection.commit()
        os.replace(draft, workspace.catalog)
    return workspace.catalog


def query(workspace: Workspace, sql: str) -> pa.Table:
    """Runs one reading statement over the committed tables; only files of the workspace can be read, none written.

    The catalog is as of the last `rebuild_catalog`. Raises: QueryFailed with DuckDB's reason.
    """
    import duckdb

    if not workspace.catalog.is_file():
        rebuild_catalog(workspace)
    try:
        # In memory, with the catalog attached: settings are this connection's own, also where threads query at once.
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH {_quoted(str(workspace.catalog))} AS workspace (READ_ONLY)")
            connection.execute("USE workspace")
            connection.execute(f"SET allowed_directories = [{_quoted(str(workspace.root))}]")
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            return connection.sql(_reading_statement(connection, sql)).to_arrow_table()
    except duckdb.Error as error:
        reason = "\n".join(line for line in str(error).splitlines() if line.strip())
        not_there = isinstance(error, (duckdb.IOException, duckdb.PermissionException))
        hint = "\nIf the workspace was moved, rebuild its catalog." if not_there else ""
        raise QueryFailed(
            f"the query was refused: {_first_lines(reason)}{hint}\nTables: {', '.join(TABLES)}."
        ) from error


def _create_view(connection: "duckdb.DuckDBPyConnection", name: str, paths: list[str]) -> None:
    import duckdb

    comment, columns = TABLES[name]
    connection.register("empty", schema(name).empty_table())
    types = {str(row[0]): str(row[1]) for row in connection.execute("DESCRIBE empty").fetchall()}
    connection.unregister("empty")
    # First an empty part: the columns are there before the stage has run, and whatever version wrote the files.
    # Most tables say their run themselves; images and latents are stored without it, and their paths have it.
    run = "" if "run_id" in types else f"regexp_extract(filename, '{_RUN_OF_PATH}', 1) AS run_id, "
    nulls = ("CAST(NULL AS VARCHAR) AS run_id, " if run else "") + ", ".join(
        f'CAST(NULL AS {kind}) AS "{column}"' for column, kind in types.items()
    )
    body = f"SELECT {nulls} WHERE false"
    if paths:
        files = ", ".join(_quoted(path) for path in paths)
        chosen, more = (f"{run}* EXCLUDE (filename)", ", filename = true") if run else ("*", "")
        body = f"({body}) UNION ALL BY NAME SELECT {chosen} FROM read_parquet([{files}], union_by_name = true{more})"
    try:
        connection.execute(f'CREATE VIEW "{name}" AS {body}')
    except (duckdb.InvalidInputException, duckdb.IOException) as error:
        raise CorruptArtifact(
            f"the catalog was not written, a file of table {name} is not readable: {_first_lines(str(error))}\nRemove "
            "its folder and run again with the same run id."
        ) from error
    connection.execute(f'COMMENT ON VIEW "{name}" IS {_quoted(comment)}')
    for column, _, meaning in ([RUN] if run else []) + columns:
        plain = column.removesuffix("?")
        text = f"{meaning} [{UNITS[plain]}]" if plain in UNITS else meaning
        connection.execute(f'COMMENT ON COLUMN "{name}"."{plain}" IS {_quoted(text)}')


def _create_macros(connection: "duckdb.DuckDBPyConnection") -> None:
    for name, (parameters, comment, body) in SCALARS.items():
        connection.execute(f"CREATE MACRO {name}({parameters}) AS {body}")
        connection.execute(f"COMMENT ON MACRO {name} IS {_quoted(comment)}")
    for name, macro in MACROS.items():
        connection.execute(f"CREATE MACRO {name}({macro.parameters}) AS TABLE {macro.sql}")
        connection.execute(f"COMMENT ON MACRO TABLE {name} IS {_quoted(macro.comment)}")


def _create_registry_view(connection: "duckdb.DuckDBPyConnection", pointer: Path) -> None:
    # A file that is there is read whenever the view is: a promotion shows at once. A workspace without one needs none.
    source = f"read_text({_quoted(str(pointer))})" if pointer.is_file() else "(SELECT '' AS content WHERE false)"
    connection.execute(_VIEW_SQL.format(view=VIEW, pointer=source))
    connection.execute(f"COMMENT ON VIEW {VIEW} IS {_quoted(_VIEW_COMMENT)}")
    meanings = {name.removesuffix("?"): meaning for name, _, meaning in TABLES["models"][1]} | _VIEW_COLUMNS
    for column, *_ in connection.execute(f"DESCRIBE {VIEW}").fetchall():
        connection.execute(f'COMMENT ON COLUMN {VIEW}."{column}" IS {_quoted(meanings[column])}')


def _reading_statement(connection: "duckdb.DuckDBPyConnection", sql: str) -> str:
    """The one statement in the text. Raises: QueryFailed unless it only reads."""
    import duckdb

    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise QueryFailed(f"the query was refused: one statement at a time is run, and there are {len(statements)}.")
    text = statements[0].query
    explained = _EXPLAIN.sub("", text, count=1) if _EXPLAIN.match(text) else None
    if explained is not None:
        _reading_statement(connection, explained)
        return text
    kind = statements[0].type
    # PIVOT is several statements inside; COPY and CREATE around a PIVOT are as well.
    if kind != duckdb.StatementType.SELECT and not (kind == duckdb.StatementType.MULTI and _READING.match(text)):
        raise QueryFailed(
            f"the query was refused: {text.split()[0].upper()} does not only read. Use SELECT, FROM, WITH, PIVOT, "
            "DESCRIBE, SUMMARIZE, SHOW or EXPLAIN; to write, open a copy of the catalog with a DuckDB client."
        )
    return text


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _first_lines(text: str) -> str:
    return "\n".join(text.splitlines()[:MESSAGE_LINES])
