"""SQL to paste into DuckDB or `popalign sql`: the questions that a reader asks next."""

from collections.abc import Sequence

from popalign_core.reporting.comparisons import HELD_OUT
from popalign_core.reporting.report_data import ReportData


def sql_queries(data: ReportData) -> Sequence[tuple[str, str]]:
    """(what it answers, SQL over the catalog's views)."""
    run, judge = _quoted(data.run_id), _quoted(data.judge_id)
    base, model = _quoted(data.base_model_id), _quoted(data.model_id)
    headline = f"""SELECT axis, model_id, value, low, high, floor, n, unknown
FROM disparities
WHERE run_id = {run} AND judge_id = {judge} AND split = '{HELD_OUT}'
  AND level = 'mean' AND target = 'uniform' AND measure = {_quoted(data.measure)}
ORDER BY axis, model_id;"""
    prompts = f"""SELECT p.text, g.axis, g."group",
       max(g.share) FILTER (g.model_id = {base}) AS before,
       max(g.share) FILTER (g.model_id = {model}) AS after
FROM group_shares AS g JOIN prompts AS p USING (run_id, prompt_id)
WHERE g.run_id = {run} AND g.judge_id = {judge} AND g.split = '{HELD_OUT}'
GROUP BY ALL
ORDER BY abs(after - before) DESC NULLS LAST, p.text, g.axis, g."group"
LIMIT 20;"""
    return (
        ("The headline: mean held-out disparity of every model", headline),
        ("The 20 largest changes of a group's share in one prompt", prompts),
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
