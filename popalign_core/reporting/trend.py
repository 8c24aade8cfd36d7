"""The page that compares runs over time: one that loads nothing, like the report of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from popalign_core.errors import InvalidInput
from popalign_core.reporting.curves import TrendPoint, trend_chart
from popalign_core.reporting.formatting import axis_label, measure_label
from popalign_core.reporting.page import environment
from popalign_core.reporting.report_data import Change, Measured, Row, matching, measured

# Measures of a run's comparison that are drawn over time, beside the disparities.
DRAWN = ("clip_score", "obedience", "unknown")
# The fact of `comparable` on which L2 depends even where model, judge and prompts are the same.
IMAGES = "Held-out images a prompt"


@dataclass(frozen=True)
class TrendRun:
    """One run. comparable: equal where figures may be compared: judge, sampler, base model, prompts, images, in words.

    verdict: promote, hold, or empty where nothing was decided. link: of its report, from the page; empty = none.
    comparisons: rows of the table of that name, of held-out prompts. stages: seconds and items by stage.
    """

    run_id: str
    started: str
    preset: str
    comparable: dict[str, str]
    verdict: str
    reason: str
    link: str
    disparities: Sequence[Row]
    comparisons: Sequence[Row]
    stages: Sequence[Row]

    @property
    def seconds(self) -> float:
        """Work of all stages."""
        return sum(float(row["seconds"]) for row in self.stages)


@dataclass(frozen=True)
class Break:
    """Where a run is not comparable with the one before it. what: which facts differ, with both values."""

    run_id: str
    what: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class TrendFigure:
    """A chart over runs and its numbers. rows: (run, before and after)."""

    title: str
    note: str
    chart: Markup
    rows: Sequence[tuple[TrendRun, Change]]
    style: str


def render_trend(runs: Sequence[TrendRun], created: str, queries: Sequence[tuple[str, str]]) -> str:
    """The whole page as HTML text. runs: in the order of their first start. Raises: InvalidInput without a run."""
    if not runs:
        raise InvalidInput("there is no run in this workspace: nothing to compare over time.")
    found = breaks(runs)
    return (
        environment()
        .get_template("trend.html.j2")
        .render(
            runs=runs,
            latest=runs[-1],
            counts={name: sum(run.verdict == name for run in runs) for name in ("promote", "hold", "")},
            breaks=found,
            other_images=any(name == IMAGES for one in found for name, *_ in one.what),
            figures=[*disparity_figures(runs, found), *comparison_figures(runs, found)],
            created=created,
            queries=queries,
        )
    )


def breaks(runs: Sequence[TrendRun]) -> list[Break]:
    """Every run whose figures do not continue those of the run before it that was measured."""
    found: list[Break] = []
    earlier: TrendRun | None = None
    for run in runs:
        if not run.disparities:
            continue
        if earlier is not None and run.comparable != earlier.comparable:
            names = sorted({*run.comparable, *earlier.comparable})
            both = [(name, earlier.comparable.get(name, "none"), run.comparable.get(name, "none")) for name in names]
            found.append(Break(run.run_id, [row for row in both if row[1] != row[2]]))
        earlier = run
    return found


def disparity_figures(runs: Sequence[TrendRun], found: Sequence[Break]) -> list[TrendFigure]:
    """One an axis: mean L2 over held-out prompts of the base and of the aligned model."""
    axes = dict.fromkeys(str(row["axis"]) for run in runs for row in run.disparities)
    figures: list[TrendFigure] = []
    for axis in axes:
        rows = [(run, _side(run, axis, "before"), _side(run, axis, "after")) for run in runs]
        figures.append(_figure(f"{axis_label(axis)}: L2 disparity", "mean over held-out prompts", rows, found, "plain"))
    return figures


def _side(run: TrendRun, axis: str, which: str) -> Measured | None:
    rows = matching(run.disparities, axis=axis, which=which)
    return measured(rows[0]) if rows else None


def comparison_figures(runs: Sequence[TrendRun], found: Sequence[Break]) -> list[TrendFigure]:
    """CLIP score, obedience and unknowns; of unknowns before and after have no intervals of their own in these rows."""
    figures: list[TrendFigure] = []
    for measure in DRAWN:
        for axis in dict.fromkeys(
            str(row["axis"]) for run in runs for row in run.comparisons if row["measure"] == measure
        ):
            rows: list[tuple[TrendRun, Measured | None, Measured | None]] = []
            for run in runs:
                own = matching(run.comparisons, measure=measure, axis=axis)
                before, after = (
                    measured(own[0], side, f"{side}_low", f"{side}_high") if own else None
                    for side in ("before", "after")
                )
                rows.append((run, before, after))
            title = ": ".join(part for part in (axis_label(axis), measure_label(measure)) if part)
            style = "significant" if measure == "clip_score" else "share"
            note = "held-out prompts, 95% intervals"
            if measure == "unknown":
                note = "held-out prompts; the interval of the change stands in each run's report"
            figures.append(_figure(title, note, rows, found, style))
    return figures


def _figure(
    title: str,
    note: str,
    rows: Sequence[tuple[TrendRun, Measured | None, Measured | None]],
    found: Sequence[Break],
    style: str,
) -> TrendFigure:
    broken = {one.run_id for one in found}
    points = [TrendPoint(run.started[:10], before, after, breaks=run.run_id in broken) for run, before, after in rows]
    chart = trend_chart(points, shares=style == "share")
    return TrendFigure(title, note, chart, [(run, Change(before, after)) for run, before, after in rows], style)
