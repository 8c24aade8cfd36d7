"""Before against after: the rows of the headline, of the charts per prompt and of the scores."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from popalign_core.attributes import CROSSING
from popalign_core.reporting.charts import disparity_bound, disparity_scale, dumbbell, scale_head
from popalign_core.reporting.formatting import Style, axis_label, from_to, measure_label
from popalign_core.reporting.report_data import Change, Measured, ReportData, Row, matching, measured, paired

MOST_PROMPTS = 30
HELD_OUT, TRAINED = "eval", "train"
SPLITS = {HELD_OUT: "held out", TRAINED: "trained", "validation": "validation"}


@dataclass(frozen=True)
class HeadlineRow:
    """One axis on held-out neutral prompts, mean over prompts. ratio: after / before."""

    label: str
    change: Change
    ratio: Measured | None
    prompts: int
    obedience: Change


def headline(data: ReportData) -> list[HeadlineRow]:
    """A row for every axis (and suite, if they are told apart) of the held-out prompts; crossed axes last."""
    rows = matching(_neutral(data), split=HELD_OUT, measure=data.measure)
    prompts = _prompt_counts(rows)
    means = _changes(matching(rows, level="mean"), ("axis", "suite"), data)
    specific = matching(_scores(data), split=HELD_OUT, kind="specific")
    obedience = {key[0]: change for key, change in _changes(specific, ("measure",), data).items()}
    return [
        HeadlineRow(
            label=_with_suite(str(axis), suite),
            change=change,
            ratio=_ratio(data, axis, change) if suite is None else _quotient(change),
            prompts=prompts[(axis, suite)],
            obedience=obedience.get(f"obedience:{axis}", Change(None, None)),
        )
        for (axis, suite), change in sorted(means.items(), key=lambda item: CROSSING in str(item[0][0]))
    ]


def _with_suite(axis: str, suite: Hashable) -> str:
    return axis_label(axis) if suite is None else f"{axis_label(axis)}, {suite}"


def _prompt_counts(rows: Sequence[Row]) -> Counter[tuple[Hashable, Hashable]]:
    prompts = {(row["axis"], row.get("suite"), row["prompt_id"]) for row in rows if row["level"] == "prompt"}
    return Counter((axis, suite) for axis, suite, _ in prompts)


def _ratio(data: ReportData, axis: Hashable, change: Change) -> Measured | None:
    """The paired ratio of the axis, else the plain quotient, which has no interval."""
    for row in _compared(data, split=HELD_OUT, axis=axis, measure=data.measure):
        return measured(row, "ratio", "ratio_low", "ratio_high")
    return _quotient(change)


def _quotient(change: Change) -> Measured | None:
    if change.before is None or change.after is None or change.before.value == 0:
        return None
    return Measured(change.after.value / change.before.value)


@dataclass(frozen=True)
class ComparedRow:
    """One row of a chart. note: what stands under the label, counts of both models."""

    label: str
    change: Change
    track: Markup
    note: str = ""


@dataclass(frozen=True)
class PromptChart:
    """Disparity per prompt on one axis, the largest fall first. total, fell: of all prompts, also those not shown."""

    title: str
    rows: Sequence[ComparedRow]
    head: Markup
    total: int
    fell: int
    compared: int
    images: str
    crossed: bool
    bound: float | None


def prompt_charts(data: ReportData, split: str) -> list[PromptChart]:
    """A chart for every suite and axis of the split."""
    texts = {row["prompt_id"]: str(row["text"]) for row in data.prompts}
    rows = matching(_neutral(data), split=split, level="prompt", measure=data.measure)
    by_chart: dict[tuple[str, Hashable], list[tuple[str, Change]]] = {}
    for (axis, suite, prompt), change in _changes(rows, ("axis", "suite", "prompt_id"), data).items():
        text = texts.get(prompt, str(prompt))
        by_chart.setdefault((str(axis), suite), []).append((text, change))
    return [_prompt_chart(axis, suite, found, data.measure) for (axis, suite), found in by_chart.items()]


def _prompt_chart(axis: str, suite: Hashable, found: list[tuple[str, Change]], measure: str) -> PromptChart:
    shown = sorted(found, key=lambda item: -abs(_move(item[1]) or 0.0))[:MOST_PROMPTS]
    shown.sort(key=lambda item: (_move(item[1]) is None, _move(item[1]) or 0.0))
    top, ticks = disparity_scale(axis, [change for _, change in shown], measure)
    moves = [move for _, change in found if (move := _move(change)) is not None]
    sides = [side for _, change in found for side in (change.before, change.after) if side is not None]
    return PromptChart(
        title=_with_suite(axis, suite),
        rows=[ComparedRow(text, change, dumbbell(change, top, ticks)) for text, change in shown],
        head=scale_head(top, ticks),
        total=len(found),
        fell=sum(move < 0 for move in moves),
        compared=len(moves),
        images=from_to(side.n for side in sides),
        crossed=CROSSING in axis,
        bound=disparity_bound(axis, measure),
    )


def _move(change: Change) -> float | None:
    return None if change.before is None or change.after is None else change.after.value - change.before.value


@dataclass(frozen=True)
class ComparedNumber:
    """A score or a further measure of disparity, of both models."""

    name: str
    of: str
    unit: str
    change: Change
    style: Style


def quality(data: ReportData) -> list[ComparedNumber]:
    """Picture quality on held-out neutral prompts."""
    rows = matching(_scores(data), split=HELD_OUT, kind="neutral")
    return _numbers([row for row in rows if not str(row["measure"]).startswith("obedience:")], data)


def scores(data: ReportData) -> list[ComparedNumber]:
    """All scores."""
    return _numbers(_scores(data), data)


def _numbers(rows: Sequence[Row], data: ReportData) -> list[ComparedNumber]:
    return [
        ComparedNumber(
            name=measure_label(str(measure)),
            of=f"{SPLITS.get(str(split), split)}, {kind}",
            unit="" if unit in (None, "share") else str(unit),
            change=change,
            style="share" if unit == "share" else "significant",
        )
        for (split, kind, measure, unit), change in _changes(rows, ("split", "kind", "measure", "unit"), data).items()
    ]


def other_measures(data: ReportData) -> list[ComparedNumber]:
    """Every disparity of more than a prompt, whatever its measure, split and target, and of each stratum of prompts."""
    rows = [row for row in _neutral(data, "") if row["level"] != "prompt" and row["split"] != "validation"]
    keys = ("split", "suite", "level", "stratum", "target", "axis", "measure")
    return [
        ComparedNumber(
            name=f"{_with_suite(str(axis), suite)}: {measure_label(str(measure))}",
            of=f"{SPLITS.get(str(split), split)}, {level if stratum is None else stratum}"
            + ("" if target in (None, "uniform") else f", target {target}"),
            unit="",
            change=change,
            style="plain",
        )
        for (split, suite, level, stratum, target, axis, measure), change in _changes(rows, keys, data).items()
    ]


@dataclass(frozen=True)
class PairedNumber:
    """A measure of both models, compared prompt by prompt."""

    name: str
    of: str
    before: float
    after: float
    difference: Measured | None
    ratio: Measured | None


def paired_numbers(data: ReportData) -> list[PairedNumber]:
    """Every paired comparison."""
    return [
        PairedNumber(
            name=": ".join(part for part in (axis_label(row["axis"]), measure_label(row["measure"])) if part),
            of=str(SPLITS.get(row["split"], row["split"])),
            before=row["before"],
            after=row["after"],
            difference=measured(row, "difference", "difference_low", "difference_high"),
            ratio=measured(row, "ratio", "ratio_low", "ratio_high"),
        )
        for row in _compared(data)
    ]


def _changes(rows: Sequence[Row], keys: Sequence[str], data: ReportData) -> dict[tuple[Hashable, ...], Change]:
    return {key: Change(measured(a), measured(b)) for key, (a, b) in paired(rows, keys, data).items()}


def _neutral(data: ReportData, target: str = "uniform") -> list[Row]:
    """Disparities of neutral prompts by the run's judge, to that target; empty = to each that was measured."""
    rows = matching(data.disparities, judge_id=data.judge_id)
    neutral = [row for row in rows if row.get("kind", "neutral") == "neutral"]
    return [row for row in neutral if not target or row.get("target", "uniform") == target]


def _scores(data: ReportData) -> list[Row]:
    """Without what is of a pair of models: see `reporting.quality.likeness`."""
    return _said_by_either([row for row in data.scores if row["measure"] != "paired_similarity"], data)


def _compared(data: ReportData, **wanted: object) -> list[Row]:
    models = {"base_model_id": data.base_model_id, "model_id": data.model_id}
    return _said_by_either(matching(data.comparisons, **models, **wanted), data)


def _said_by_either(rows: Sequence[Row], data: ReportData) -> list[Row]:
    """Rows of the run's judge, of the builder's model, and of the scorers of this run."""
    known = {data.judge_id, data.builder_id, *(row["scorer_id"] for row in data.group_scores)}
    return [row for row in rows if row["judge_id"] in known]
