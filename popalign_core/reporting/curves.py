"""Line charts as inline SVG: values over steps or rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from popalign_core.reporting.charts import nice_ticks, tag
from popalign_core.reporting.report_data import Measured

_HEIGHT = 170
_MOST_POINTS = 300
# Shares that move by a hundredth would fill the height of a chart, and look like a great change.
_LEAST_SPAN_OF_SHARES = 0.1
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Line:
    """values: one a position of the x axis. dashed: how the second of two lines is told from the first."""

    label: str
    values: Sequence[float]
    dashed: bool = False


def step_chart(
    lines: Sequence[Line],
    boundaries: Sequence[tuple[int, str]],
    guide: float | None = None,
    *,
    shares: bool = False,
) -> Markup:
    """Values over training steps.

    boundaries: (position, label) where a round begins. guide: a value to compare with, as a dotted line. shares: the
    values lie between 0 and 1. Long runs are drawn as means of neighbouring steps (see `steps_per_point`).
    """
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    count = max((len(line.values) for line in lines), default=0)
    if not finite:
        return Markup('<p class="missing">No finite value was recorded.</p>')
    ticks = _padded_ticks([*finite, *([guide] if guide is not None else [])], shares=shares)
    parts = _grid(ticks)
    for position, label in boundaries:
        x = _across(position, count)
        parts.append(tag("line", class_="boundary", x1=x, x2=x, y1=0, y2=_HEIGHT))
        parts.append(tag("text", label, class_="boundary-label", x=x, y=-6))
    if guide is not None:
        y = _down(guide, ticks)
        parts.append(tag("line", class_="floor", x1="0%", x2="100%", y1=y, y2=y))
    drawn = [_polyline(line, ticks) for line in lines]
    parts.append(
        tag("svg", *drawn, viewBox=f"0 0 1000 {_HEIGHT}", preserveAspectRatio="none", width="100%", height=_HEIGHT)
    )
    return _framed(parts)


def steps_per_point(steps: int) -> int:
    """How many steps one drawn point is the mean of."""
    return max(1, math.ceil(steps / _MOST_POINTS))


def _polyline(line: Line, ticks: Sequence[float]) -> Markup:
    width = steps_per_point(len(line.values))
    last = max(1, len(line.values) - 1)
    commands: list[str] = []
    broken = True
    for start in range(0, len(line.values), width):
        chunk = line.values[start : start + width]
        mean = sum(chunk) / len(chunk)
        if math.isfinite(mean):
            x = 1000 * (start + (len(chunk) - 1) / 2) / last
            commands.append(f"{'M' if broken else 'L'}{x:.1f} {_down(mean, ticks)}")
        broken = not math.isfinite(mean)
    return tag("path", class_="curve dashed" if line.dashed else "curve", d=" ".join(commands))


@dataclass(frozen=True)
class Point:
    """One measurement of a round. kept: whether this checkpoint is the one that was kept."""

    label: str
    measured: Measured
    kept: bool


def round_chart(points: Sequence[Point]) -> Markup:
    """A measure over rounds with intervals and floors; the model before training is hollow, the kept one ringed."""
    values = [point.measured for point in points]
    ends = [end for value in values for end in (value.value, value.low, value.high, value.floor) if end is not None]
    ticks = _padded_ticks([0.0, *ends])
    parts = _grid(ticks)
    # Half a step of room on either side, where the floor's line and the labels would meet the ticks.
    across = [f"{100 * (position + 0.5) / len(points):.2f}%" for position in range(len(points))]
    places = [(x, _down(point.measured.value, ticks)) for x, point in zip(across, points, strict=True)]
    parts += [tag("line", class_="curve", x1=x1, y1=y1, x2=x2, y2=y2) for (x1, y1), (x2, y2) in pairwise(places)]
    for position, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        name = "after" if position else "before"
        measured = point.measured
        if measured.low is not None and measured.high is not None:
            y1, y2 = _down(measured.low, ticks), _down(measured.high, ticks)
            parts.append(tag("line", class_=f"interval-line {name}", x1=x, x2=x, y1=y1, y2=y2))
        if measured.floor is not None:
            at = _down(measured.floor, ticks)
            parts.append(tag("svg", tag("line", class_="floor", x1=-14, x2=14, y1=at, y2=at), x=x, overflow="visible"))
        if point.kept:
            parts.append(tag("circle", class_="ring", cx=x, cy=y, r=9))
            parts.append(tag("text", "kept", class_="kept", x=x, y=_HEIGHT + 31))
        parts.append(tag("circle", class_=f"mark {name}", cx=x, cy=y, r=5))
        parts.append(tag("text", point.label, class_="below", x=x, y=_HEIGHT + 17))
    return _framed(parts)


def _grid(ticks: Sequence[float]) -> list[Markup]:
    parts: list[Markup] = []
    for tick in ticks:
        y = _down(tick, ticks)
        parts.append(tag("line", class_="grid", x1="0%", x2="100%", y1=y, y2=y))
        parts.append(tag("text", f"{tick:.4g}", class_="left", x=-8, y=y, dy=4))
    return parts


def _framed(parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, class_="plot", height=_HEIGHT, aria_hidden="true", focusable="false")


def _padded_ticks(values: Sequence[float], *, shares: bool = False) -> list[float]:
    low, high = min(values), max(values)
    if shares and high - low < _LEAST_SPAN_OF_SHARES:
        # In the middle of the chart, but not beyond what a share can be.
        low = max(0.0, min((low + high - _LEAST_SPAN_OF_SHARES) / 2, 1 - _LEAST_SPAN_OF_SHARES))
        return nice_ticks(low, low + _LEAST_SPAN_OF_SHARES, most=4)
    # A constant series would otherwise have no height, nor one that only rounding moves: ticks have twelve decimals.
    # Half its size either way keeps it in the middle.
    constant = high - low <= _CONSTANT * max(1.0, abs(low), abs(high))
    pad = (abs(high) / 2 if abs(high) > _CONSTANT else 0.5) if constant else 0.0
    return nice_ticks(low - pad, high + pad, most=4)


def _across(position: int, count: int) -> str:
    return f"{100 * position / max(1, count - 1):.2f}%"


def _down(value: float, ticks: Sequence[float]) -> str:
    return f"{_HEIGHT * (ticks[-1] - value) / (ticks[-1] - ticks[0]):.1f}"


@dataclass(frozen=True)
class TrendPoint:
    """A run's measure on both models. breaks: what it says does not continue what was said before it."""

    label: str
    before: Measured | None
    after: Measured | None
    breaks: bool = False


_MOST_LABELS = 4  # on a phone they would run into each other


def trend_chart(points: Sequence[TrendPoint], *, shares: bool = False) -> Markup:
    """A measure over runs: base models hollow, aligned ones filled, each joined to the last that is comparable.

    shares: the values lie between 0 and 1.
    """
    sides = [side for point in points for side in (point.before, point.after) if side is not None]
    ends = [end for side in sides for end in (side.value, side.low, side.high, side.floor) if end is not None]
    if not ends:
        return Markup('<p class="missing">No run has been measured.</p>')
    ticks = _padded_ticks(ends, shares=shares)
    parts = _grid(ticks)
    across = [100 * (position + 0.5) / len(points) for position in range(len(points))]
    for x, point in zip(across, points, strict=True):
        if point.breaks:
            at = f"{x - 50 / len(points):.2f}%"
            parts.append(tag("line", class_="boundary", x1=at, x2=at, y1=0, y2=_HEIGHT))
            parts.append(tag("text", "measured otherwise", class_="boundary-label", x=at, y=-6))
    for name, shift in (("before", -3), ("after", 3)):
        # Moved apart by pixels: of one run the two intervals would lie on each other.
        drawn = _joined(points, across, ticks, name)
        drawn += [mark for x, point in zip(across, points, strict=True) for mark in _marks(point, name, x, ticks)]
        parts.append(tag("svg", *drawn, x=shift, width="100%", height=_HEIGHT, overflow="visible"))
    every = math.ceil(len(points) / _MOST_LABELS)
    for position in range(0, len(points), every):
        parts.append(tag("text", points[position].label, class_="below", x=f"{across[position]:.2f}%", y=_HEIGHT + 17))
    return _framed(parts)


def _side_of(point: TrendPoint, name: str) -> Measured | None:
    return point.before if name == "before" else point.after


def _joined(points: Sequence[TrendPoint], across: Sequence[float], ticks: Sequence[float], name: str) -> list[Markup]:
    lines: list[Markup] = []
    last: tuple[float, str] | None = None
    for x, point in zip(across, points, strict=True):
        side = _side_of(point, name)
        if point.breaks:
            last = None
        if side is None:
            continue
        here = (x, _down(side.value, ticks))
        if last is not None:
            ends = {"x1": f"{last[0]:.2f}%", "y1": last[1], "x2": f"{x:.2f}%", "y2": here[1]}
            lines.append(tag("line", class_=f"trend {name}", **ends))
        last = here
    return lines


def _marks(point: TrendPoint, name: str, across: float, ticks: Sequence[float]) -> list[Markup]:
    side = _side_of(point, name)
    if side is None:
        return []
    x, parts = f"{across:.2f}%", list[Markup]()
    if side.low is not None and side.high is not None:
        ends = {"y1": _down(side.low, ticks), "y2": _down(side.high, ticks)}
        parts.append(tag("line", class_=f"interval-line {name}", x1=x, x2=x, **ends))
    if side.floor is not None and name == "after":
        at = _down(side.floor, ticks)
        parts.append(tag("svg", tag("line", class_="floor", x1=-9, x2=3, y1=at, y2=at), x=x, overflow="visible"))
    parts.append(tag("circle", class_=f"mark {name}", cx=x, cy=_down(side.value, ticks), r=4))
    return parts
