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
    eval_only = f"run_id = {run} AND split = '{HELD_OUT}'"
    return (
        ("The headline: mean held-out disparity of every model", headline),
        ("What changed, paired over prompts: disparities, unknowns, scores, obedience", _all("comparisons", eval_only)),
        ("The 20 largest changes of a group's share in one prompt", prompts),
        ("Disparity of each prompt, the aligned model's", f"FROM worst_prompts({run}, {model}, top := 100000);"),
        ("Which prompts changed, by a test on pairs of images from the same noise", f"FROM changes({run});"),
        ("Shares of groups, all prompts together", _all("group_shares", f"{eval_only} AND prompt_id IS NULL")),
        ("The images behind a share, one group of one prompt", _images(run, model, data)),
        ("Agreement of the two classifiers", _all("agreements", eval_only)),
        ("Images without a group, and why", _all("status_counts", eval_only)),
        ("Scores of both models", _all("scores", eval_only)),
        ("Scores within perceived groups", _all("group_scores", eval_only)),
        ("How far groups are apart in each score", f"FROM gaps({run});"),
        ("Diversity within perceived groups", _all("group_diversities", eval_only)),
        ("Distance of the images from the base model's, and what chance gives", _all("distances", eval_only)),
        ("The same distance within perceived groups", _all("group_distances", eval_only)),
        ("What changed outside the person", _all("entanglements", eval_only)),
        ("How many images were drawn, and why no more", _all("extensions", f"run_id = {run}")),
        *_of_the_course(run),
    )


def _of_the_course(run: str) -> Sequence[tuple[str, str]]:
    whole = f"run_id = {run}"
    return (
        ("Several training seeds", _all("seed_summaries", whole)),
        ("Shares corrected for the judge's errors, from an audit", _all("corrected_shares", whole)),
        ("Votes of people", _all("votes", whole)),
        ("Prompts that gave no preference", _all("refusals", whole)),
        ("Validation by round", _all("validations", whole)),
        ("Training, step by step", _all("training_steps", whole)),
        ("Populations of each round", _all("populations", whole)),
        (
            "The decision and its checks",
            f"SELECT unnest(checks, recursive := true) FROM decisions WHERE run_id = {run};",
        ),
        ("Seconds and images by stage", f"FROM cost({run});"),
    )


def _all(table: str, where: str) -> str:
    return f"FROM {table} WHERE {where} ORDER BY ALL;"


def _images(run: str, model: str, data: ReportData) -> str:
    shown = [row for row in data.group_shares if row["prompt_id"] is not None and row["split"] == HELD_OUT]
    if not shown:
        return f"FROM samples WHERE run_id = {run} AND model_id = {model};"
    axis, group = _quoted(str(shown[0]["axis"])), _quoted(str(shown[0]["group"]))
    prompt = _quoted(str(shown[0]["prompt_id"]))
    return f"FROM images_behind({run}, {model}, {prompt}, wanted_axis := {axis}, wanted_group := {group});"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
