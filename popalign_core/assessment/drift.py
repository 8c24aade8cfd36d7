"""Whether a model's disparity moved between two measurements by more than their uncertainty."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot


@dataclass(frozen=True)
class Measured:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Drift:
    """An axis whose disparity moved. tolerance: what chance alone would exceed in about one of twenty measurements."""

    axis: str
    before: Measured
    now: Measured
    tolerance: float


def drifted(before: Mapping[str, Measured], now: Mapping[str, Measured]) -> list[Drift]:
    """The axes, measured both times, whose value moved beyond the interval of the difference.

    The two are taken as independent: the half width of the difference's interval is the root of the sum of the
    squared half widths, each on the side that faces the other value. "Outside the earlier interval" would alarm by
    chance in one of six nights. Nights that share seeds vary less, so the false-alarm rate is 5% at most.
    """
    found: list[Drift] = []
    for axis in now.keys() & before.keys():
        old, new = before[axis], now[axis]
        rises = new.value > old.value
        facing = (old.high - old.value, new.value - new.low) if rises else (old.value - old.low, new.high - new.value)
        tolerance = hypot(*facing)
        if abs(new.value - old.value) > tolerance:
            found.append(Drift(axis, old, new, tolerance))
    return sorted(found, key=lambda drift: drift.axis)
