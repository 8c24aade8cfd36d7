"""When to stop and which checkpoint to keep: decided from measured held-out disparity.

A preference loss with a small beta has its optimum far beyond the target (see `objective.natural_beta`), so the loss
cannot tell when to stop. Pure functions of the measurements so far: a resumed run decides as an undisturbed one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from popalign_core.errors import InvalidInput

StopReason = Literal["arrived", "turned"]


@dataclass(frozen=True)
class HeldOutPoint:
    """One measurement on held-out prompts during training. disparities: per axis, >= 0. quality: higher is better."""

    step: int
    disparities: Mapping[str, float]
    quality: float | None = None


@dataclass(frozen=True)
class StopVerdict:
    """best: position of the point to keep in the history. reason: None to go on."""

    best: int
    reason: StopReason | None


@dataclass(frozen=True)
class StopRule:
    """Keep the most even point, stop when things turn.

    patience: measurements without a better one until "turned". min_gain: by how much the score must fall to count as
    better. floors: per axis, the disparity that sampling alone would show (0 where not given); smaller values are
    counted as it, since nothing smaller is measured. max_quality_drop: share of the quality before training that a
    point may have lost; one that lost more is never the best, however even. None: quality is not looked at.
    """

    patience: int = 2
    min_gain: float = 0.0
    floors: Mapping[str, float] = field(default_factory=dict[str, float])
    max_quality_drop: float | None = None

    def judge(self, history: Sequence[HeldOutPoint]) -> StopVerdict:
        """The verdict after the last measurement. history[0] is the model before training.

        "arrived": every axis of the best point is at its floor. "turned": `patience` points brought nothing better.
        Raises: InvalidInput for an empty history or points with other axes.
        """
        if not history:
            raise InvalidInput("the model before training must be measured first.")
        scores = [self.score(history[0].disparities, point.disparities) for point in history]
        best = 0
        for position in range(len(history)):
            if scores[position] < scores[best] - self.min_gain and self.is_sound(history[0], history[position]):
                best = position
        if all(value <= self.floors.get(axis, 0.0) for axis, value in history[best].disparities.items()):
            return StopVerdict(best, "arrived")
        return StopVerdict(best, "turned" if len(history) - 1 - best >= self.patience else None)

    def is_sound(self, before: HeldOutPoint, now: HeldOutPoint) -> bool:
        """Whether a point has kept its quality. Raises: InvalidInput where that was not measured."""
        if self.max_quality_drop is None:
            return True
        if before.quality is None or now.quality is None:
            raise InvalidInput("max_quality_drop needs the quality of every point.")
        return now.quality >= (1 - self.max_quality_drop) * before.quality

    def score(self, before: Mapping[str, float], now: Mapping[str, float]) -> float:
        """Mean over axes of disparity relative to that before training: 1 at the start, lower is more even.

        Relative, so that no axis outweighs another by its number of groups. Raises: InvalidInput.
        """
        _require_comparable(before, now)
        ratios = [self._raised(axis, value) / self._raised(axis, before[axis]) for axis, value in now.items()]
        return sum(ratios) / len(ratios)

    def _raised(self, axis: str, disparity: float) -> float:
        # An axis that is exactly even before training needs some denominator: any later rise then counts heavily.
        return max(disparity, self.floors.get(axis, 0.0), 1e-6)


def _require_comparable(before: Mapping[str, float], now: Mapping[str, float]) -> None:
    if before.keys() != now.keys() or not before:
        raise InvalidInput(f"disparities of {sorted(now)} cannot be compared with those of {sorted(before)}.")
    for axis, value in [*before.items(), *now.items()]:
        if not math.isfinite(value):
            raise InvalidInput(f"the disparity of {axis} is not a number; were there any labelled samples?")
