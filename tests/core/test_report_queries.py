"""The made-up rows are rows of the real tables, and the SQL that the report offers gives the report's numbers."""

from dataclasses import replace

import duckdb
import pyarrow as pa
import pytest
import report_rows as made_up

from popalign_core.reporting.queries import sql_queries
from popalign_core.reporting.report_data import matching
from storage.schemas import schema

TABLES = (
    "prompts",
    "disparities",
    "comparisons",
    "group_shares",
    "scores",
    "group_scores",
    "group_diversities",
    "group_gaps",
    "distances",
    "group_distances",
    "entanglements",
    "extensions",
    "agreements",
    "status_counts",
    "populations",
    "refusals",
    "training_steps",
    "validations",
    "models",
    "timings",
)


def as_table(name, rows) -> pa.Table:
    columns = schema(name)
    table = pa.Table.from_pylist([row | {"requested": []} if name == "prompts" else row for row in rows], columns)
    nulls = [field.name for field in columns if not field.nullable and table[field.name].null_count]
    assert nulls == []
    return table


@pytest.mark.parametrize("name", TABLES)
def test_made_up_rows_fit_their_tables(name):
    rows = getattr(made_up.good_run(), name)
    assert len(as_table(name, rows)) == len(rows) > 0
    used = {column for row in rows for column in row}
    assert used <= set(schema(name).names)
    assert all(field.nullable for field in schema(name) if field.name not in used)


def test_the_made_up_decision_fits_its_table():
    assert len(as_table("decisions", [made_up.decision()])) == 1


@pytest.mark.parametrize("run_id", ["night-12", "o'clock; DROP TABLE prompts; --"])
def test_queries_answer(run_id):
    data = replace(made_up.good_run(), run_id=run_id)
    with duckdb.connect() as connection:
        for name in ("prompts", "disparities", "group_shares"):
            connection.register(name, as_table(name, [row | {"run_id": run_id} for row in getattr(data, name)]))
        queries = dict(sql_queries(data))
        headline = queries["The headline: mean held-out disparity of every model"]
        changes = queries["The 20 largest changes of a group's share in one prompt"]
        means = matching(data.disparities, split="eval", level="mean", measure="l2")
        answer = connection.execute(headline).fetchall()
        assert sorted(row[2] for row in answer) == sorted(row["value"] for row in means)
        found = connection.execute(changes).fetchall()
    assert len(found) == 20
    moves = [abs(row[4] - row[3]) for row in found]
    assert moves == sorted(moves, reverse=True)
    assert moves[0] > 0.3
    assert found[0][0].startswith("a photo of ")
