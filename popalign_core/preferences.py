"""Winners and losers matched one to one, and how much each pair counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

# Below this a sum of gaps that cancel exactly is rounding.
_NO_GAP = 1e-12


class PairWeighting(StrEnum):
    """Whether pairs that move the population towards its target count more. See `pair_weights`."""

    EVEN = "even"
    CONTRAST = "contrast"
    DISCREPANCY = "discrepancy"
    AXIS = "axis"


@dataclass(frozen=True)
class Preference:
    """One pair under the neutral caption. weight >= 0; a pair of weight 0 says nothing and is not to be trained on."""

    pair_id: str
    population_id: str
    prompt_id: str
    caption: str
    winner_sample_id: str
    loser_sample_id: str
    weight: float


def pair_weights(
    winners: np.ndarray,
    losers: np.ndarray,
    gaps: Sequence[np.ndarray],
    weighting: PairWeighting,
    discrepancy: float = 1.0,
) -> np.ndarray:
    """The weights of one population's pairs, (pairs,), float64.

    winners, losers: (pairs, axes) positions of the perceived groups, -1 where unknown. gaps: per axis (groups,), the
    target's share of each group minus its share among the model's own samples: above 0 where under-represented.

    even: 1 for every pair. contrast: for every axis gap[winner] - gap[loser], summed, cut off at 0, and scaled to mean
    1 over the pairs above 0. To first order this is how fast half the squared L2 distances to the targets fall when
    share moves from the loser's group to the winner's; it is 0 where both are the same, and an unknown group has no
    gap. discrepancy: contrast times `discrepancy`, so that weights vanish as the population arrives at its target.
    axis: contrast that is not scaled to mean 1, so that a prompt near its target weighs less than one far from it; the
    gaps are expected to have been scaled by what is left on each axis, see `population_counts.axis_excess`.
    All are 0 where no pair moves it closer.
    """
    if weighting is PairWeighting.EVEN:
        return np.ones(len(winners))
    raw = np.zeros(len(winners))
    for axis, gap in enumerate(gaps):
        # Position -1 reads the appended 0.
        padded = np.append(gap, 0.0)
        raw += padded[winners[:, axis]] - padded[losers[:, axis]]
    raw[raw < _NO_GAP] = 0.0
    counted = raw > 0
    if counted.any() and weighting is not PairWeighting.AXIS:
        raw /= raw[counted].mean()
    return raw * discrepancy if weighting is PairWeighting.DISCREPANCY else raw


def excess_discrepancy(counts: np.ndarray, target: np.ndarray) -> float:
    """How far a population is from its target beyond what its size explains, 0 to 1.

    counts: (groups,) of n samples, or (populations, groups), over which the squares are averaged; target: shares,
    (groups,) or (populations, groups). The squared L2 distance less its upward bias (1 - sum of squared shares) /
    (n - 1), which makes it unbiased; cut off at 0; its root as a part of the largest distance possible, that of the
    single group farthest from the target. Populations of n < 2 are left out; 0 where none is left.
    """
    table = np.atleast_2d(counts).astype(np.float64)
    targets = np.broadcast_to(target, table.shape)[table.sum(axis=1) >= 2]
    table = table[table.sum(axis=1) >= 2]
    single_groups = np.eye(table.shape[1])
    farthest = float(np.square(single_groups - targets[:, None]).sum(axis=2).max(axis=1).mean()) if len(table) else 0.0
    # A vocabulary of one group has no distance at all.
    if not farthest > 0:
        return 0.0
    sizes = table.sum(axis=1, keepdims=True)
    shares = table / sizes
    bias = (1 - np.square(shares).sum(axis=1)) / (sizes[:, 0] - 1)
    squared = float((np.square(shares - targets).sum(axis=1) - bias).mean())
    return float(np.sqrt(np.clip(squared / farthest, 0.0, 1.0)))


def match_losers(winner_indices: Sequence[int], own_indices: Sequence[int], rng: np.random.Generator) -> list[int]:
    """For every winner the position of its loser in own_indices, each used once.

    A winner takes the sample with its own index where that is free, because both started from the same noise; the
    others share out what is left in a random order. Needs at least as many own samples as winners.
    """
    free = {index: position for position, index in reversed(list(enumerate(own_indices)))}
    matched = [free.pop(index, None) for index in winner_indices]
    used = {position for position in matched if position is not None}
    rest = iter([position for position in rng.permutation(len(own_indices)).tolist() if position not in used])
    return [next(rest) if position is None else position for position in matched]
