"""How many images show a given fall of the mean disparity: by simulating the paired comparison of an assessment."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.uncertainty import compare
from popalign_core.errors import InvalidInput

POWER = 0.8
# Of a power of 80% this is a standard error of 2.8%.
SIMULATIONS, RESAMPLES = 200, 200
MOST_IMAGES = 4096


@dataclass(frozen=True)
class Detection:
    """power: how often a fall of that size is shown with `images` a prompt. disparity: of the base model, mean L2.

    needed: the fewest images a prompt, to a twentieth, with which it is shown in 80%; None = no number up to 4,096:
    more prompts are needed.
    """

    prompts: int
    images: int
    disparity: float
    change: float
    power: float
    needed: int | None


def detection(shares: np.ndarray, target: np.ndarray, change: float, images: int, *, seed: int) -> Detection:
    """shares: of the base model's groups (prompts, groups). target: (groups,). change: fall of the mean L2, above 0.

    A fall counts as shown where the 95% interval of the paired difference lies below 0, as the gate asks. Every prompt
    is taken to move the same part of its way to the target, and the images of both models to be independent.
    Raises: InvalidInput for a change that the base model's disparity has no room for, or fewer than two prompts.
    """
    before = l2_discrepancy(shares, target).mean()
    if len(shares) < 2:
        raise InvalidInput(f"an interval over prompts needs two or more, and there is {len(shares)}.")
    if not 0 < change <= before:
        raise InvalidInput(
            f"the disparity of the base model is {before:.3f}: it can fall by more than 0 and at most by that, "
            f"and {change:g} is to be detected."
        )
    after = shares + (target - shares) * (change / before)

    def power(count: int) -> float:
        return _power(shares, after, target, count, seed)

    return Detection(len(shares), images, float(before), change, power(images), _fewest(power))


def _power(before: np.ndarray, after: np.ndarray, target: np.ndarray, images: int, seed: int) -> float:
    rng = np.random.default_rng(seed)  # the same source for every number of images, so that the search is steady
    shown = 0
    for _ in range(SIMULATIONS):
        tables = [rng.multinomial(images, side) for side in (before, after)]
        change = compare(tables[0], tables[1], target, l2_discrepancy, rng=rng, resamples=RESAMPLES)
        shown += change.difference.high < 0
    return shown / SIMULATIONS


def _fewest(power: Callable[[int], float]) -> int | None:
    """By doubling, then halving the gap to a twentieth; power is taken to grow with images."""
    high = 2
    while power(high) < POWER:
        high *= 2
        if high > MOST_IMAGES:
            return None
    low = high // 2
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high
