"""Quality beyond the overall scores: within perceived groups, as a distance to the base, and on how many images."""

from collections.abc import Sequence
from dataclasses import dataclass

from popalign_core.reporting.comparisons import HELD_OUT
from popalign_core.reporting.formatting import axis_label, measure_label
from popalign_core.reporting.report_data import Change, Measured, ReportData, Row, matching, measured, paired


@dataclass(frozen=True)
class GroupNumber:
    """A number of one group's images, of both models. measure, unit: in words."""

    group: str
    measure: str
    unit: str
    change: Change


@dataclass(frozen=True)
class GroupTable:
    """Numbers within the groups of one axis, on held-out neutral prompts."""

    title: str
    rows: Sequence[GroupNumber]


def within_groups(data: ReportData) -> list[GroupTable]:
    """Scores and diversity of each perceived group, axis by axis; every group has a row."""
    scores = matching(data.group_scores, split=HELD_OUT, judge_id=data.judge_id)
    diversities = [
        {**row, "measure": "vendi_score", "unit": f"effective number among {row['size']}"}
        for row in matching(data.group_diversities, split=HELD_OUT, judge_id=data.judge_id)
    ]
    rows: list[Row] = [*scores, *diversities]
    tables: list[GroupTable] = []
    for axis in dict.fromkeys(str(row["axis"]) for row in rows):
        pairs = paired(matching(rows, axis=axis), ("group", "measure", "unit"), data)
        numbers = [
            GroupNumber(str(group), measure_label(str(measure)), str(unit), Change(measured(before), measured(after)))
            for (group, measure, unit), (before, after) in pairs.items()
        ]
        tables.append(GroupTable(axis_label(axis), sorted(numbers, key=lambda number: number.measure)))
    return tables


@dataclass(frozen=True)
class Gap:
    """How far the groups of an axis are apart in one score, and what chance would pass once in twenty times."""

    axis: str
    measure: str
    unit: str
    difference: Change
    chance_before: float | None
    chance_after: float | None


def gaps(data: ReportData) -> list[Gap]:
    """On held-out neutral prompts, by axis and score."""
    rows = matching(data.group_gaps, split=HELD_OUT, judge_id=data.judge_id)
    ends = ("difference", "difference_low", "difference_high")
    return [
        Gap(
            axis_label(str(axis)),
            measure_label(str(measure)),
            str(unit),
            Change(measured(before, *ends), measured(after, *ends)),
            *(None if row is None else row["null_high"] for row in (before, after)),
        )
        for (axis, measure, unit), (before, after) in paired(rows, ("axis", "measure", "unit"), data).items()
    ]


@dataclass(frozen=True)
class Distance:
    """Of the aligned model's images from the base's, all or those that show one group.

    n_base, n_aligned: images of either. null_mean, null_high: what sides that are swapped, or dealt anew, give on the
    average and at most. All three None where a side has too few images.
    """

    measure: str
    features_id: str
    of: str
    value: float | None
    null_mean: float | None
    null_high: float | None
    n_base: int
    n_aligned: int


def distances(data: ReportData) -> list[Distance]:
    """On held-out neutral prompts; of each measure all images first."""
    whole = [
        {**row, "of": "all images", "n_base": row["n"], "n_aligned": row["n"]}
        for row in matching(data.distances, split=HELD_OUT, model_id=data.model_id)
    ]
    by_group = [
        {**row, "of": f"{axis_label(str(row['axis']))}: {row['group']}"}
        for row in matching(data.group_distances, split=HELD_OUT, model_id=data.model_id, judge_id=data.judge_id)
    ]
    order = {name: position for position, name in enumerate(dict.fromkeys(str(row["measure"]) for row in whole))}
    rows: list[Row] = sorted([*whole, *by_group], key=lambda row: order.get(str(row["measure"]), len(order)))
    return [
        Distance(
            measure_label(str(row["measure"])),
            str(row["features_id"]),
            str(row["of"]),
            *(row[name] for name in ("value", "null_mean", "null_high")),
            n_base=int(row["n_base"]),
            n_aligned=int(row["n_aligned"]),
        )
        for row in rows
    ]


KINDS = {"neutral": "neutral prompts", "fact": "controls: a fact", "no_person": "controls: nobody"}


def likeness(data: ReportData) -> list[tuple[str, Measured]]:
    """By kind of held-out prompts: mean cosine of the two models' images of one noise."""
    rows = matching(data.scores, split=HELD_OUT, measure="paired_similarity", model_id=data.model_id)
    found = [(KINDS.get(str(row["kind"]), str(row["kind"])), measured(row)) for row in rows]
    return [(kind, value) for kind, value in found if value is not None]


@dataclass(frozen=True)
class Extension:
    """Why more held-out images of a prompt were drawn, or no more."""

    axis: str
    images: int
    half_width: Measured
    wanted: float
    reason: str


def extensions(data: ReportData) -> list[Extension]:
    """By images, then axis; none where no precision was asked for."""
    rows = sorted(data.extensions, key=lambda row: int(row["images"]))
    return [
        Extension(
            axis_label(str(row["axis"])),
            int(row["images"]),
            Measured(float(row["half_width"])),
            float(row["wanted"]),
            str(row["reason"]),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Surroundings:
    """How much changed outside persons, of pairs whose group changed and of those whose group is the same."""

    axis: str
    changed: Measured | None
    same: Measured | None
    changed_pairs: int
    same_pairs: int
    left_out: int


def surroundings(data: ReportData) -> list[Surroundings]:
    """By axis, on held-out neutral prompts; none where nobody was looked for."""
    rows = matching(data.entanglements, split=HELD_OUT, judge_id=data.judge_id, model_id=data.model_id)
    found: list[Surroundings] = []
    for axis in dict.fromkeys(str(row["axis"]) for row in rows):
        (changed,), (same,) = (matching(rows, axis=axis, changed=which) for which in (True, False))
        pairs = (int(changed["n"]), int(same["n"]), int(same["left_out"]))
        found.append(Surroundings(axis_label(axis), measured(changed), measured(same), *pairs))
    return found
