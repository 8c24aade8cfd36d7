"""Loss spikes: one loss far above those just before it."""

import math
from collections.abc import Sequence
from statistics import median

WINDOW = 50
LEAST = 20
# Losses that hardly move have a spread near 0, and any noise would then be a spike.
LEAST_RELATIVE_SPREAD = 0.01
STANDARD_DEVIATIONS_PER_MAD = 1.4826


def spike_score(recent: Sequence[float], loss: float) -> float:
    """How far a loss lies above the median of the recent ones, in robust standard deviations; >= 0.

    The spread is 1.4826 times the median absolute deviation, which the standard deviation of normal values is, but at
    least 1% of the median. 0 until LEAST losses are known; a loss that is no number is infinitely far.
    Of normal losses one in 3.5 million lies beyond 5. A single outlier moves neither median nor spread.
    """
    if not math.isfinite(loss):
        return math.inf
    if len(recent) < LEAST:
        return 0.0
    middle = median(recent)
    spread = STANDARD_DEVIATIONS_PER_MAD * median(abs(value - middle) for value in recent)
    floor = max(LEAST_RELATIVE_SPREAD * abs(middle), 1e-12)
    return max(0.0, (loss - middle) / max(spread, floor))
