"""Inline SVG for one row of a chart. Positions are percentages, so that text and markers keep their size on a phone."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from popalign_core.attributes import axis_named
from popalign_core.errors import UnknownName
from popalign_core.reporting.report_data import Change, Measured

_BEFORE_LANE, _AFTER_LANE, _TRACK_HEIGHT = 9, 23, 32
_LEAST_LABELLED_SHARE = 0.18


def tag(name: str, *content: Markup | str, **attributes: object) -> Markup:
    """An element with everything escaped; `stroke_width` becomes stroke-width, `class_` class."""
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(content))


def percent(value: float, top: float) -> str:
    """Where a value lies on a scale from 0 to top; beyond the ends it stays at the end."""
    share = value / top if top > 0 else 0.0
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def disparity_scale(axis: str, changes: Sequence[Change], measure: str) -> tuple[float, list[float]]:
    """End and ticks of the scale: the disparity of one group alone if that is known, else the largest number."""
    present = [side for change in changes for side in (change.before, change.after) if side is not None]
    top = max([1e-3, *(side.value if side.high is None else max(side.value, side.high) for side in present)])
    top = max(top, disparity_bound(axis, measure) or 0.0)
    return top, [tick for tick in nice_ticks(0.0, top) if tick <= top]


def disparity_bound(axis: str, measure: str) -> float | None:
    """The L2 disparity of one group alone against an even target, sqrt(1 - 1/K); None for other measures and axes."""
    if measure != "l2":
        return None
    try:
        return math.sqrt(1 - 1 / len(axis_named(axis).groups))
    except UnknownName:
        return None


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover low to high: the first not above low, the last not below high."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(count * step, 12) for count in range(first, last + 1)]


def scale_head(top: float, ticks: Sequence[float], as_shares: bool = False) -> Markup:
    """The tick labels above a column of tracks."""
    texts = [
        tag("text", f"{100 * tick:.0f}%" if as_shares else f"{tick:g}", x=percent(tick, top), y=11) for tick in ticks
    ]
    return tag("svg", *texts, class_="track scale", height=14, aria_hidden="true", focusable="false")


def dumbbell(change: Change, top: float, ticks: Sequence[float], target: float | None = None) -> Markup:
    """Before (hollow, upper lane) and after (filled, lower lane) with intervals and floors, and the target if any."""
    parts = [_vertical("grid", tick, top, 0, _TRACK_HEIGHT) for tick in ticks]
    if target is not None:
        parts.append(_vertical("target", target, top, 0, _TRACK_HEIGHT))
    if change.before is not None and change.after is not None:
        ends = {"x1": percent(change.before.value, top), "x2": percent(change.after.value, top)}
        parts.append(tag("line", class_="link", **ends, y1=_BEFORE_LANE, y2=_AFTER_LANE))
    parts += _lane(change.before, "before", _BEFORE_LANE, top)
    parts += _lane(change.after, "after", _AFTER_LANE, top)
    return tag("svg", *parts, class_="track", height=_TRACK_HEIGHT, aria_hidden="true", focusable="false")


def _lane(side: Measured | None, name: str, y: int, top: float) -> list[Markup]:
    if side is None:
        return []
    parts: list[Markup] = []
    if side.floor is not None:
        parts.append(_vertical("floor", side.floor, top, y - 7, y + 7))
    if side.low is not None and side.high is not None:
        ends = {"x1": percent(side.low, top), "x2": percent(side.high, top)}
        parts.append(tag("line", class_=f"interval-line {name}", **ends, y1=y, y2=y))
    parts.append(tag("circle", class_=f"mark {name}", cx=percent(side.value, top), cy=y, r=5))
    return parts


def _vertical(name: str, value: float, top: float, y1: float, y2: float) -> Markup:
    x = percent(value, top)
    return tag("line", class_=name, x1=x, x2=x, y1=y1, y2=y2)


def stacked_bar(shares: Sequence[float]) -> Markup:
    """One bar of shares that add up to 1, each part numbered from 1 in the order of its groups."""
    parts: list[Markup] = []
    start = 0.0
    for position, share in enumerate(shares):
        # From light to mid only: the numbers on it must stay readable in both colour schemes.
        strength = 0.1 + 0.38 * position / max(1, len(shares) - 1)
        places = {"x": percent(start, 1), "width": percent(share, 1)}
        parts.append(tag("rect", class_="part", **places, y=0, height=24, fill_opacity=f"{strength:.2f}"))
        if share >= 0.04:
            text = f"{position + 1}: {100 * share:.0f}%" if share >= _LEAST_LABELLED_SHARE else f"{position + 1}"
            parts.append(tag("text", text, x=percent(start + share / 2, 1), y=16))
        start += share
    return tag("svg", *parts, class_="stacked", height=24, aria_hidden="true", focusable="false")
