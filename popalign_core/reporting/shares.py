"""Shares of each group in all held-out images together, before and after; of two axes at once as a grid."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from popalign_core.attributes import CROSSING, axis_named
from popalign_core.errors import UnknownName
from popalign_core.reporting.charts import dumbbell, nice_ticks, scale_head, stacked_bar
from popalign_core.reporting.comparisons import HELD_OUT, ComparedRow
from popalign_core.reporting.formatting import axis_label
from popalign_core.reporting.report_data import Change, Measured, ReportData, Row, matching, measured, paired

Sides = tuple[Row | None, Row | None]


@dataclass(frozen=True)
class AxisShares:
    """Shares of one axis's groups in all held-out images together. empty: groups that no image was perceived as."""

    label: str
    rows: Sequence[ComparedRow]
    head: Markup
    bars: Sequence[tuple[str, Markup | None]]
    empty: Sequence[tuple[str, str]]
    target: float


@dataclass(frozen=True)
class ShareGrid:
    """Shares of a crossed axis, [before, after] of [rows][columns]. darkest: the share with the strongest shade."""

    label: str
    row_groups: Sequence[str]
    column_groups: Sequence[str]
    sides: Sequence[tuple[str, Sequence[Sequence[Measured | None]]]]
    darkest: float
    target: float


def _pooled_shares(data: ReportData) -> dict[str, dict[str, Sides]]:
    """Axis -> group -> (before, after), every group of the axis in its order."""
    rows = matching(data.group_shares, judge_id=data.judge_id, split=HELD_OUT, prompt_id=None)
    found: dict[str, dict[str, Sides]] = {}
    for (axis, group), sides in paired(rows, ("axis", "group"), data).items():
        found.setdefault(str(axis), {})[str(group)] = sides
    return {axis: {group: of.get(group, (None, None)) for group in _groups(axis, of)} for axis, of in found.items()}


def _groups(axis: str, present: Iterable[str]) -> Sequence[str]:
    try:
        return axis_named(axis).groups
    except UnknownName:
        return list(present)


def axis_shares(data: ReportData) -> list[AxisShares]:
    """Pooled group shares of every axis that is not crossed."""
    return [_axis_shares(axis, of) for axis, of in _pooled_shares(data).items() if CROSSING not in axis]


def _axis_shares(axis: str, of: Mapping[str, Sides]) -> AxisShares:
    changes = {group: _share_change(sides) for group, sides in of.items()}
    values = [side for change in changes.values() for side in (change.before, change.after) if side is not None]
    top = max([0.01, *(max(side.value, side.high or 0.0) for side in values)])
    ticks = [tick for tick in nice_ticks(0.0, top) if tick <= top]
    target = 1 / len(of)
    rows = [
        ComparedRow(
            f"{number}. {group}", changes[group], dumbbell(changes[group], top, ticks, target), _counts(of[group])
        )
        for number, group in enumerate(of, start=1)
    ]
    befores, afters = [change.before for change in changes.values()], [change.after for change in changes.values()]
    named = (("Before", befores), ("After", afters))
    return AxisShares(
        label=axis_label(axis),
        rows=rows,
        head=scale_head(top, ticks, as_shares=True),
        bars=[(name, _bar(side)) for name, side in named],
        empty=[
            (name.lower(), group)
            for name, side in named
            for group, share in zip(of, side, strict=True)
            if share is not None and share.value == 0
        ],
        target=target,
    )


def _share_change(sides: Sides) -> Change:
    return Change(measured(sides[0], "share"), measured(sides[1], "share"))


def _counts(sides: Sides) -> str:
    texts = ["not counted" if row is None else f"{row['count']:,} of {row['n']:,}" for row in sides]
    return " \u2192 ".join(texts)


def _bar(side: Sequence[Measured | None]) -> Markup | None:
    shares = [share.value for share in side if share is not None]
    return stacked_bar(shares) if len(shares) == len(side) else None


def share_grids(data: ReportData) -> list[ShareGrid]:
    """Pooled shares of every axis that crosses two."""
    found: list[ShareGrid] = []
    for axis, of in _pooled_shares(data).items():
        parts = axis.split(CROSSING)
        if len(parts) != 2:
            continue
        rows, columns = (axis_named(part).groups for part in parts)
        changes = {group: _share_change(sides) for group, sides in of.items()}
        before = [[changes[CROSSING.join((row, column))].before for column in columns] for row in rows]
        after = [[changes[CROSSING.join((row, column))].after for column in columns] for row in rows]
        cells = [cell.value for side in (before, after) for line in side for cell in line if cell is not None]
        sides = (("Before", before), ("After", after))
        found.append(ShareGrid(axis_label(axis), rows, columns, sides, max([1e-6, *cells]), 1 / len(of)))
    return found
