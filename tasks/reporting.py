"""The report of a run as one HTML file."""

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.config import RunConfig
from popalign_core.reporting.contact_sheet import contact_sheet
from popalign_core.reporting.report import render_report
from popalign_core.reporting.report_data import ContactSheet, ReportData
from popalign_core.reporting.strips import perceived_text
from storage.catalog import query, rebuild_catalog
from storage.compaction import compact
from storage.images import decode_image
from storage.layout import Workspace
from storage.publication import publish_file
from storage.tables import read_images, read_rows
from tasks.assessment import BUILDER_ROLE, JUDGE_ROLE, classifier_name
from tasks.corrections import newest_corrections
from tasks.run import BASE

SHEET_COLUMNS = 10
SHEET_ROWS = 12
ROWS = (
    "prompts disparities comparisons group_shares scores group_scores group_diversities "
    "group_gaps distances group_distances "
    "entanglements extensions agreements status_counts populations refusals training_steps "
    "validations models seeds seed_summaries timings sampler_differences"
).split()
YIELDS = """SELECT round, "group", sum(drawn)::INTEGER AS drawn, sum(kept)::INTEGER AS kept
FROM yields WHERE run_id = '{run_id}' GROUP BY ALL ORDER BY ALL"""


@task(cache_policy=NO_CACHE)
def write_report(workspace: str, run_id: str, config: RunConfig) -> Path:
    """Renders the report from the committed tables, as far as the run got; returns its path."""
    place = Workspace.open(workspace)
    compact(place)
    rebuild_catalog(place)
    rows: dict[str, Any] = {name: read_rows(place, run_id, name) for name in ROWS}
    decisions = read_rows(place, run_id, "decisions")
    kept = decisions[0]["model_id"] if decisions else _last_model(rows["models"])
    run, starts = read_rows(place, run_id, "runs")[0], read_rows(place, run_id, "starts")
    judge_id = classifier_name(JUDGE_ROLE, config)
    data = ReportData(
        run_id=run_id,
        created=starts[0]["started_at"],
        config=json.loads(run["config_json"]),
        versions=json.loads(starts[-1]["versions_json"]),
        base_model_id=BASE,
        model_id=kept,
        judge_id=judge_id,
        builder_id=classifier_name(BUILDER_ROLE, config),
        decision=decisions[0] if decisions else None,
        yields=query(place, YIELDS.format(run_id=run_id)).to_pylist(),
        votes=read_rows(place, run_id, "votes"),
        **newest_corrections(workspace, run_id),
        sheets=held_out_sheets(place, run_id, kept, rows["prompts"], SHEET_ROWS, judge_id),
        **rows,
    )
    return publish_file(place, run_id, "report.html", render_report(data).encode())


def _last_model(models: list[dict[str, Any]]) -> str:
    # Before any training there is nothing to compare with: the page then says what is missing.
    return str(models[-1]["model_id"]) if models else "not trained yet"


def held_out_sheets(
    place: Workspace, run_id: str, kept: str, prompts: list[dict[str, Any]], most: int, judge_id: str = ""
) -> list[ContactSheet]:
    """The same prompts and seeds before and after: held-out neutral ones, so many at most; none without images.

    judge_id: whose perceived attributes are said of every picture; without one nothing is said.
    """
    shown = [row for row in prompts if row["split"] == "eval" and row["kind"] == "neutral"][:most]
    wanted = {
        model: [[f"{model}/{row['prompt_id']}/{i}" for i in range(SHEET_COLUMNS)] for row in shown]
        for model in (BASE, kept)
    }
    found = read_images(place, run_id, [sample for grid in wanted.values() for line in grid for sample in line])
    drawn = {
        model: [[decode_image(found[sample]) if sample in found else None for sample in line] for line in grid]
        for model, grid in wanted.items()
    }
    sheets = {
        model: contact_sheet(grid) if any(cell is not None for line in grid for cell in line) else None
        for model, grid in drawn.items()
    }
    if sheets[BASE] is None:
        return []
    said = _perceived(place, run_id, list(found), judge_id) if judge_id else {}
    both = ([[said.get(sample, "") for sample in line] for line in wanted[model]] for model in (BASE, kept))
    texts = [row["text"] for row in shown]
    return [ContactSheet("Held-out neutral prompts", sheets[BASE], sheets[kept], texts, *both)]


def _perceived(place: Workspace, run_id: str, samples: list[str], judge_id: str) -> dict[str, str]:
    wanted = {"classifier_id": judge_id, "sample_id": samples}
    columns = ["sample_id", "classifier_id", "axis", "label", "status"]
    outcomes: dict[str, dict[str, dict[str, Any]]] = {sample: {} for sample in samples}
    for row in read_rows(place, run_id, "attributes", columns=columns, equal=wanted):
        # An image that was drawn for two purposes has a row of each, and they say the same.
        outcomes[row["sample_id"]][row["axis"]] = row
    return {sample: perceived_text(list(rows.values())) for sample, rows in outcomes.items()}
