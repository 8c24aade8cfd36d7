"""How the run went: training curves, held-out disparity by round, populations, refusals, cost by stage."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from popalign_core.attributes import CROSSING, axis_named
from popalign_core.errors import UnknownName
from popalign_core.reporting.charts import stacked_bar
from popalign_core.reporting.curves import Line, Point, round_chart, step_chart, steps_per_point
from popalign_core.reporting.formatting import axis_label
from popalign_core.reporting.report_data import ReportData, Row, measured

MOST_REFUSALS = 20


@dataclass(frozen=True)
class Curve:
    """A chart of training. lines: (label, dashed) of each line, for the legend where there are two."""

    title: str
    note: str
    chart: Markup
    lines: Sequence[tuple[str, bool]] = ()


def training_curves(data: ReportData) -> list[Curve]:
    """Loss, implicit accuracy and margins over all steps of all rounds; of a policy gradient loss and reward."""
    repeated = {row["model_id"] for row in data.models if row.get("repeats_model_id")}
    own = [row for row in data.training_steps if row["model_id"] not in repeated]
    steps = sorted(own, key=lambda row: (row["round"], row["model_id"], row["step"]))
    if not steps:
        return []
    boundaries: list[tuple[int, str]] = []
    for position, row in enumerate(steps):
        if position == 0 or row["model_id"] != steps[position - 1]["model_id"]:
            boundaries.append((position, str(row["model_id"])))
    boundaries = boundaries if len(boundaries) > 1 else []
    width = steps_per_point(len(steps))
    means = f" Each point is the mean of {width} steps." if width > 1 else ""

    def line(column: str, label: str, dashed: bool = False) -> Line:
        return Line(label, [float(row[column]) for row in steps], dashed)

    loss = Curve("Loss", f"{len(steps):,} steps.{means}", step_chart([line("loss", "loss")], boundaries))
    if any(row.get("reward") is not None for row in steps):
        note = "Mean over the images of a step, each judged by the others of its prompt; dotted: on the target."
        return [loss, Curve("Reward", note, step_chart([line("reward", "reward")], boundaries, guide=0.0))]
    margins = [line("winner_margin", "winners"), line("loser_margin", "losers", dashed=True)]
    return [
        loss,
        Curve(
            "Implicit accuracy",
            "Share of pairs whose winner gained more on the reference than its loser; dotted: chance.",
            step_chart([line("implicit_accuracy", "implicit accuracy")], boundaries, guide=0.5, shares=True),
        ),
        Curve(
            "Margins",
            "Mean gain on the reference; dotted: none.",
            step_chart(margins, boundaries, guide=0.0),
            [(drawn.label, drawn.dashed) for drawn in margins],
        ),
    ]


def validation_curves(data: ReportData) -> list[Curve]:
    """Validation disparity per axis, of the base model (round 0) and of each round's."""
    by_axis: dict[str, list[Point]] = {}
    for row in sorted(data.validations, key=lambda row: row["round"]):
        value = measured(row, "disparity")
        if value is not None:
            by_axis.setdefault(row["axis"], []).append(Point(row["model_id"], value, bool(row["selected"])))
    return [Curve(axis_label(axis), "", round_chart(points)) for axis, points in by_axis.items()]


@dataclass(frozen=True)
class RoundSummary:
    """One trained model. first, last: its first and last training step, None where none was recorded."""

    model: Row
    first: Row | None
    last: Row | None
    kept: bool


def rounds(data: ReportData) -> list[RoundSummary]:
    """Every trained model with where its training began and ended."""
    by_model: defaultdict[str, list[Row]] = defaultdict(list)
    for row in data.training_steps:
        by_model[row["model_id"]].append(row)
    kept = {row["model_id"] for row in data.validations if row["selected"]}
    found: list[RoundSummary] = []
    for model in sorted(data.models, key=lambda row: (row["round"], row["model_id"])):
        steps = sorted(by_model[model["model_id"]], key=lambda row: row["step"])
        first, last = (steps[0], steps[-1]) if steps else (None, None)
        found.append(RoundSummary(model, first, last, model["model_id"] in kept))
    return found


@dataclass(frozen=True)
class PopulationMix:
    """One side of one round's populations together. counts: in the order of the axis's groups."""

    round: int
    side: str
    prompts: int
    bar: Markup
    counts: Sequence[int]
    unknown: int


@dataclass(frozen=True)
class AxisMixes:
    """What the populations were made of on one axis, round by round, the dispreferred side first."""

    label: str
    groups: Sequence[str]
    mixes: Sequence[PopulationMix]


def population_mixes(data: ReportData) -> list[AxisMixes]:
    """The populations of every axis that is not crossed."""
    by_axis: dict[str, list[Row]] = {}
    for row in data.populations:
        if CROSSING not in row["axis"]:
            by_axis.setdefault(row["axis"], []).append(row)
    found: list[AxisMixes] = []
    for axis, rows in by_axis.items():
        try:
            groups: Sequence[str] = axis_named(axis).groups
        except UnknownName:
            groups = list(dict.fromkeys(row["group"] for row in rows))
        by_side: dict[tuple[int, str], list[Row]] = {}
        for row in rows:
            by_side.setdefault((row["round"], row["side"]), []).append(row)
        mixes = [_mix(*key, groups, of) for key, of in sorted(by_side.items())]
        found.append(AxisMixes(axis_label(axis), groups, mixes))
    return found


def _mix(number: int, side: str, groups: Sequence[str], rows: Sequence[Row]) -> PopulationMix:
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["group"]] += row["count"]
    total = max(1, counts.total())
    # Each group's row repeats the unknowns of its population: they are counted once.
    unknown = {row["population_id"]: row["unknown"] for row in rows}
    return PopulationMix(
        round=number,
        side=side,
        prompts=len(unknown),
        bar=stacked_bar([counts[group] / total for group in groups]),
        counts=[counts[group] for group in groups],
        unknown=sum(unknown.values()),
    )


@dataclass(frozen=True)
class Refusals:
    """Prompts without a pair. reasons: how many prompts each; named: the first few (round, prompt, what was wrong)."""

    total: int
    reasons: Sequence[tuple[str, int]]
    named: Sequence[tuple[int, str, str]]


def refusals(data: ReportData) -> Refusals:
    """Refusals by reason, the most frequent first."""
    texts = {row["prompt_id"]: str(row["text"]) for row in data.prompts}
    reasons = Counter(str(row["reason"]) for row in data.refusals)
    named = [
        (row["round"], texts.get(row["prompt_id"], str(row["prompt_id"])), str(row.get("detail") or row["reason"]))
        for row in data.refusals[:MOST_REFUSALS]
    ]
    return Refusals(len(data.refusals), reasons.most_common(), named)


@dataclass(frozen=True)
class StageCost:
    """Work of one stage on one device, summed over its shards."""

    stage: str
    device: str
    seconds: float
    items: int

    @property
    def gpu_hours(self) -> float | None:
        """None on the CPU. A training in several processes is one row, of the first: its device is "4 x cuda"."""
        processes, _, kind = self.device.rpartition(" x ")
        return None if kind == "cpu" else (int(processes) if processes.isdecimal() else 1) * self.seconds / 3600


def all_gpu_hours(costs: Sequence[StageCost]) -> float | None:
    """Those of all stages together; None where all was done on the CPU."""
    hours = [cost.gpu_hours for cost in costs if cost.gpu_hours is not None]
    return sum(hours) if hours else None


def stage_costs(data: ReportData) -> list[StageCost]:
    """Cost of every stage and device, in the order in which they came."""
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    items: Counter[tuple[str, str]] = Counter()
    for row in data.timings:
        key = (str(row["stage"]), str(row["device"]))
        seconds[key] += row["seconds"]
        items[key] += row["items"] or 0
    return [StageCost(*key, seconds=spent, items=items[key]) for key, spent in seconds.items()]
