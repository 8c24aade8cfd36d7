"""The page that compares a workspace's runs over time, from the catalog."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popalign_core.errors import PopalignError
from popalign_core.reporting.trend import DRAWN, IMAGES, TrendRun, render_trend
from storage.catalog import query, rebuild_catalog
from storage.errors import StorageError
from storage.layout import Workspace
from storage.publication import publish_page

PAGE = "trend.html"
RUNS = """SELECT r.run_id, r.preset, s.started_at, coalesce(d.verdict, '') AS verdict, coalesce(d.reason, '') AS reason,
       json_extract_string(r.config_json, '$.model') AS model,
       json_extract_string(r.config_json, '$.model_lora') AS model_lora,
       json_extract_string(r.config_json, '$.model_unet') AS model_unet
FROM runs AS r
JOIN (SELECT run_id, min(started_at) AS started_at FROM starts GROUP BY run_id) AS s USING (run_id)
LEFT JOIN decisions AS d USING (run_id)
ORDER BY s.started_at, r.run_id"""
NIGHTS = "FROM nights() WHERE which IS NOT NULL OR verdict IS NULL"
COMPARISONS = f"""SELECT c.run_id, c.axis, c.measure, c.before, b.low AS before_low, b.high AS before_high,
       c.after, a.low AS after_low, a.high AS after_high, c.judge_id
FROM comparisons AS c
LEFT JOIN scores AS b
  ON b.run_id = c.run_id AND b.model_id = c.base_model_id AND b.judge_id = c.judge_id AND b.split = c.split
 AND b.kind IN ('neutral', 'specific')
 AND b.measure = CASE c.measure WHEN 'obedience' THEN 'obedience:' || c.axis ELSE c.measure END
LEFT JOIN scores AS a
  ON a.run_id = c.run_id AND a.model_id = c.model_id AND a.judge_id = c.judge_id AND a.split = c.split
 AND a.kind = b.kind AND a.measure = b.measure
WHERE c.split = 'eval' AND c.measure IN {DRAWN} ORDER BY c.run_id, c.axis, c.measure"""
STAGES = """SELECT run_id, stage, sum(seconds) AS seconds, CAST(sum(items) AS BIGINT) AS items
FROM timings GROUP BY ALL ORDER BY run_id, seconds DESC"""
SAMPLERS = """SELECT run_id, string_agg(DISTINCT sampler_fingerprint, ' ' ORDER BY sampler_fingerprint) AS samplers
FROM samples WHERE model_id = 'base' GROUP BY run_id"""
PROMPTS = """SELECT run_id, string_agg(text, chr(10) ORDER BY text) AS texts
FROM prompts WHERE split = 'eval' AND kind = 'neutral' GROUP BY run_id"""
# What was measured, and not what was asked for: an assessment may double its images until it is precise enough.
COUNTED = """SELECT run_id, string_agg(DISTINCT d.n + d.unknown, ' or ' ORDER BY d.n + d.unknown) AS images
FROM disparities AS d JOIN prompts AS p USING (run_id, prompt_id)
WHERE d.split = 'eval' AND d.level = 'prompt' AND d.measure = 'l2' AND d.target = 'uniform' AND p.kind = 'neutral'
GROUP BY run_id"""
QUERIES = (
    ("Disparities of every run", NIGHTS + ";"),
    ("Quality, obedience and unknowns of every run", COMPARISONS + ";"),
    ("Work by run and stage", STAGES + ";"),
)


def write_trend(workspace: str, last: int = 0) -> Path:
    """Writes the page into the workspace; returns its path. last: only so many runs, 0 = all. Raises: InvalidInput."""
    place = Workspace.open(workspace)
    rebuild_catalog(place)
    runs = trend_runs(place)[-last:]
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return publish_page(place, PAGE, render_trend(runs, made, QUERIES).encode())


@task(cache_policy=NO_CACHE)
def refresh_trend(workspace: str) -> None:
    """The same after a night; a page that cannot be made is told of and ends no run, whose decision stands."""
    try:
        write_trend(workspace)
    except (PopalignError, StorageError) as error:
        get_run_logger().warning("the page of the trend was not written: %s", error)


def trend_runs(place: Workspace) -> list[TrendRun]:
    """All runs that were started, in the order of their first start; the catalog is as it was last rebuilt."""
    by_run = {name: _by_run(place, sql) for name, sql in _SOURCES.items()}

    def rows(name: str, run_id: str) -> list[dict[str, Any]]:
        return by_run[name].get(run_id, [])

    found: list[TrendRun] = []
    for run in query(place, RUNS).to_pylist():
        run_id = run["run_id"]
        nights = rows("nights", run_id)
        report = f"runs/{run_id}/report.html"
        comparable = {
            "Base model": " + ".join(filter(None, (run["model"], run["model_lora"], run["model_unet"]))),
            "Judge": ", ".join(sorted({row["judge_id"] for row in nights})),
            "Sampler": "".join(row["samplers"] for row in rows("samplers", run_id)),
            "Held-out prompts": "".join(_digest(row["texts"]) for row in rows("prompts", run_id)),
            IMAGES: "".join(row["images"] for row in rows("counted", run_id)),
        }
        found.append(
            TrendRun(
                run_id,
                run["started_at"],
                run["preset"],
                comparable,
                run["verdict"],
                run["reason"],
                report if (place.root / report).is_file() else "",
                nights,
                rows("comparisons", run_id),
                rows("stages", run_id),
            )
        )
    return found


_SOURCES = {
    "nights": NIGHTS,
    "comparisons": COMPARISONS,
    "stages": STAGES,
    "samplers": SAMPLERS,
    "prompts": PROMPTS,
    "counted": COUNTED,
}


def _by_run(place: Workspace, sql: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in query(place, sql).to_pylist():
        found.setdefault(row["run_id"], []).append(row)
    return found


def _digest(text: str) -> str:
    return f"{text.count(chr(10)) + 1} texts, {hashlib.sha256(text.encode()).hexdigest()[:8]}"
