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
class Distance:
    """Of the aligned model's images from the base's. null: what swapped sides give on the average; high: at most."""

    measure: str
    features_id: str
    value: float
    null_mean: float
    null_high: float
    n: int


def distances(data: ReportData) -> list[Distance]:
    """On held-out neutral prompts."""
    rows = matching(data.distances, split=HELD_OUT, model_id=data.model_id)
    return [
        Distance(
            measure_label(str(row["measure"])),
            str(row["features_id"]),
            *(float(row[name]) for name in ("value", "null_mean", "null_high")),
            n=int(row["n"]),
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
