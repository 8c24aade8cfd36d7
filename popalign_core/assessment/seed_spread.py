"""How much of a result is the luck of the training seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.errors import InvalidInput


@dataclass(frozen=True)
class SeedSpread:
    """A measure over trainings that differ in their seed alone.

    deviation: standard deviation over seeds, n - 1. low, high: 95% interval of the mean over seeds, by Student's t: of
    this data, not of other prompts or images. best, worst: smallest and largest.
    """

    seeds: int
    mean: float
    deviation: float
    low: float
    high: float
    best: float
    worst: float


def seed_spread(values: Sequence[float]) -> SeedSpread:
    """values: one a seed, at least two. Raises: InvalidInput."""
    if len(values) < 2 or not np.isfinite(values).all():
        raise InvalidInput(f"a spread over seeds needs two or more measured values, got {list(values)}.")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return SeedSpread(len(values), mean, deviation, mean - half, mean + half, min(values), max(values))
