"""Assembles the report: one HTML page that needs nothing else, neither network nor scripts."""

import json
from dataclasses import dataclass

from popalign_core.config import SamplingConfig
from popalign_core.reporting import classifiers, comparisons, course, people, quality, queries, shares, strips
from popalign_core.reporting.formatting import measure_label, plain_words
from popalign_core.reporting.page import environment
from popalign_core.reporting.report_data import Measured, ReportData, matching, measured

_VERDICTS = {"promote": "Promote", "hold": "Hold"}


@dataclass(frozen=True)
class Verdict:
    """kind: promote, hold, unfinished or failed."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class Check:
    """One check of the decision."""

    name: str
    passed: bool
    measured: Measured | None
    threshold: float | None


def render_report(data: ReportData) -> str:
    """The whole page as HTML text.

    Parts of the run that have no rows yet are named as not finished. Raises: InvalidInput for a contact sheet that
    cannot be read.
    """
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            verdict=verdict(data),
            missing=missing_parts(data),
            sheets=strips.strip_sheets(data.sheets),
            agreements=classifiers.agreements(data),
            unlabelled=classifiers.unlabelled(data),
            studies=people.studies(data),
            corrected=people.corrected_axes(data),
            checks=decision_checks(data),
            approximations=_approximations(data),
            config_text=json.dumps(data.config, indent=2, ensure_ascii=False, default=str),
            queries=queries.sql_queries(data),
            measure_name=measure_label(data.measure),
            most_prompts=comparisons.MOST_PROMPTS,
            **_figures(data),
            **_course(data),
        )
    )


def _figures(data: ReportData) -> dict[str, object]:
    """What was measured on images."""
    held_out = comparisons.prompt_charts(data, comparisons.HELD_OUT)
    return {
        "headline": comparisons.headline(data),
        "quality": comparisons.quality(data),
        "held_out_charts": [chart for chart in held_out if not chart.crossed],
        "folded_charts": [chart for chart in held_out if chart.crossed],
        "trained_charts": comparisons.prompt_charts(data, comparisons.TRAINED),
        "shares": shares.axis_shares(data),
        "grids": shares.share_grids(data),
        "scores": comparisons.scores(data),
        "within_groups": quality.within_groups(data),
        "gaps": quality.gaps(data),
        "distances": quality.distances(data),
        "likeness": quality.likeness(data),
        "surroundings": quality.surroundings(data),
        "extensions": quality.extensions(data),
        "other_measures": comparisons.other_measures(data),
        "paired": comparisons.paired_numbers(data),
    }


def _course(data: ReportData) -> dict[str, object]:
    """How the run went."""
    costs = course.stage_costs(data)
    return {
        "curves": course.training_curves(data),
        "validation": course.validation_curves(data),
        "rounds": course.rounds(data),
        "mixes": course.population_mixes(data),
        "refusals": course.refusals(data),
        "costs": costs,
        "gpu_hours": course.all_gpu_hours(costs),
    }


def _approximations(data: ReportData) -> tuple[str, ...]:
    sampling = data.config.get("sampling")
    return SamplingConfig.model_validate(sampling).approximations if sampling else ()


def verdict(data: ReportData) -> Verdict:
    """What the page says first."""
    if data.failure:
        return Verdict("failed", "Failed", data.failure)
    if data.decision is None:
        return Verdict("unfinished", "Not finished", "No decision has been taken: parts of the run are still missing.")
    kind = str(data.decision["verdict"])
    return Verdict(kind, _VERDICTS.get(kind, plain_words(kind)), str(data.decision["reason"]))


def decision_checks(data: ReportData) -> list[Check]:
    """The decision's checks; none if there is no decision."""
    if data.decision is None:
        return []
    return [
        Check(str(row["name"]), bool(row["passed"]), measured(row), row["threshold"]) for row in data.decision["checks"]
    ]


def missing_parts(data: ReportData) -> list[str]:
    """A sentence for every part of the run that has left nothing to show."""
    judged = matching(data.disparities, judge_id=data.judge_id, split=comparisons.HELD_OUT)
    present = {row["model_id"] for row in judged}
    shown = [sheet for sheet in data.sheets if sheet.before is not None and sheet.after is not None]
    parts = {
        "Expansion: no prompts.": bool(data.prompts),
        f"Assessment: {data.base_model_id} has not been measured on held-out prompts.": data.base_model_id in present,
        f"Assessment: {data.model_id} has not been measured on held-out prompts.": data.model_id in present,
        "Populations: none built.": bool(data.populations),
        "Alignment: no training step recorded.": bool(data.training_steps),
        "Assessment: no scores.": bool(data.scores),
        "Sampling: no contact sheet of both models.": bool(shown),
        "Decision: none taken.": data.decision is not None,
    }
    return [text for text, there in parts.items() if not there]
