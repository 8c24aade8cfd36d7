"""How far the perceived groups of a population are from a target: measures on counts.

Every measure takes counts (..., groups), zeros included and unknowns left out, and the target's shares (groups,), or
those for each leading index, and returns one number for every leading index, nan where nothing was counted. Groups are
the whole vocabulary of an axis: one that never occurs counts as missing.
"""

from collections.abc import Callable

import numpy as np
from scipy.special import rel_entr  # pyright: ignore[reportMissingTypeStubs]

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]


def shares(counts: np.ndarray) -> np.ndarray:
    """Shares of the groups, (..., groups), nan where nothing was counted."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def l2_discrepancy(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The paper's discrepancy, ||p - q||_2, over the whole vocabulary. A collapsed population has sqrt(1 - 1/K).

    Sampling alone gives `sampling_floor` images of a population that is exactly on target.
    """
    return np.sqrt(np.square(shares(counts) - target).sum(axis=-1))


def unbiased_squared_l2(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """L2 squared without the part that sampling adds: sum (p - q)^2 - (1 - sum p^2) / (n - 1).

    With shares s of the population, E sum (p - q)^2 = sum (s - q)^2 + (1 - sum s^2) / n, and (1 - sum p^2) n / (n - 1)
    has the mean 1 - sum s^2. So the mean is sum (s - q)^2 for every n >= 2; single values can be negative. nan below 2.
    """
    p = shares(counts)
    total = counts.sum(axis=-1)
    noise = (1 - np.square(p).sum(axis=-1)) / np.where(total > 1, total - 1, np.nan)
    return np.square(p - target).sum(axis=-1) - noise


def total_variation(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Half of sum |p - q|: the share of images whose group would have to change to reach the target."""
    return np.abs(shares(counts) - target).sum(axis=-1) / 2


def kl_divergence(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """KL(p || q) = sum p log(p / q) in nats, 0 log 0 = 0; infinite where a group without target occurs."""
    p = shares(counts)
    with np.errstate(divide="ignore"):
        log_target = np.log(target)
    log_p = np.log(np.where(p > 0, p, 1))
    terms = np.where(p > 0, p * (log_p - np.where(p > 0, log_target, 0)), np.where(np.isnan(p), np.nan, 0))
    return terms.sum(axis=-1)


def jensen_shannon_distance(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Sqrt of (KL(p || m) + KL(q || m)) / 2 in bits, m = (p + q) / 2: a metric from 0 to 1 (Endres & Schindelin 2003).

    scipy's `jensenshannon` with base 2, but for the root of what rounding leaves below 0.
    """
    p = shares(counts)
    middle = (p + target) / 2
    divergence = (rel_entr(p, middle) + rel_entr(target, middle)).sum(axis=-1) / 2
    return np.sqrt(np.maximum(divergence, 0) / np.log(2))


def normalized_entropy(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """-sum p log p / log K: 1 = all K groups alike, 0 = one group. Of the target only the length counts."""
    p = shares(counts)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)
    return np.maximum(entropy, 0) / np.log(target.shape[-1])


def worst_group_share(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The smallest share among groups that the target asks for; 0 = one of them never occurs."""
    return np.where(target > 0, shares(counts), np.inf).min(axis=-1)


def worst_group_ratio(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The smallest share in proportion to its target, min p / q: 1 = on target, 0 = a group never occurs."""
    p = shares(counts)
    ratios = np.divide(p, target, out=np.full(np.broadcast_shapes(p.shape, target.shape), np.inf), where=target > 0)
    return ratios.min(axis=-1)


def demographic_parity_difference(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Between the group most above its target and the one most below it, max (p - q) - min (p - q).

    For a uniform target the largest share less the smallest one, which is fairlearn's measure of that name with "shows
    the group" as the selection.
    """
    return np.ptp(shares(counts) - target, axis=-1)


def demographic_parity_ratio(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The group most below its target in proportion to the one most above it, min (p / q) / max (p / q): 1 = on target.

    For a uniform target the smallest share by the largest one, which is fairlearn's measure of that name. The "four
    fifths" of employment law are of it.
    """
    p = shares(counts)
    wanted = np.broadcast_to(target > 0, p.shape)
    times = np.divide(p, target, out=np.full(p.shape, np.nan), where=wanted)
    least = np.asarray(np.where(wanted, times, np.inf).min(axis=-1))
    most = np.asarray(np.where(wanted, times, -np.inf).max(axis=-1))
    return np.divide(least, most, out=np.full(least.shape, np.nan), where=most > 0)


def paper_code_discrepancy(counts: np.ndarray, _target: np.ndarray) -> np.ndarray:
    """The L2 discrepancy as the paper's released code computes it, only to compare with its numbers.

    That code takes as groups those that were observed, and as target 1 / (number of observed groups). It so differs
    from the paper's equation and from `l2_discrepancy`: groups that never occur do not count as missing. A population
    of one group has 0 rather than sqrt(1 - 1/K), and half white, half asian has 0 rather than 0.577 of six groups.
    """
    observed = counts > 0
    even = observed / np.maximum(observed.sum(axis=-1, keepdims=True), 1)
    return np.sqrt(np.square(shares(counts) - even).sum(axis=-1))


def sampling_floor(n: int | np.ndarray, groups: int) -> np.ndarray:
    """sqrt((1 - 1/K) / n): root mean square L2 of n samples of a population that is exactly uniform over K groups.

    E ||p - q||^2 = sum q (1 - q) / n, the multinomial variance. A discrepancy at its floor cannot be told from none.
    """
    n = np.asarray(n, dtype=np.float64)
    return np.sqrt(np.divide(1 - 1 / groups, n, out=np.full(n.shape, np.nan), where=n > 0))


MEASURES: dict[str, Measure] = {
    "l2": l2_discrepancy,
    "unbiased_squared_l2": unbiased_squared_l2,
    "total_variation": total_variation,
    "kl_divergence": kl_divergence,
    "jensen_shannon_distance": jensen_shannon_distance,
    "normalized_entropy": normalized_entropy,
    "worst_group_share": worst_group_share,
    "worst_group_ratio": worst_group_ratio,
    "demographic_parity_difference": demographic_parity_difference,
    "demographic_parity_ratio": demographic_parity_ratio,
    "paper_code_disparity": paper_code_discrepancy,
}
# What each measure can be for any counts and target: an interval ends there.
RANGES: dict[str, tuple[float, float]] = {
    "l2": (0, np.sqrt(2)),
    "unbiased_squared_l2": (-1, 2),
    "total_variation": (0, 1),
    "kl_divergence": (0, np.inf),
    "jensen_shannon_distance": (0, 1),
    "normalized_entropy": (0, 1),
    "worst_group_share": (0, 1),
    "worst_group_ratio": (0, 1),
    "demographic_parity_difference": (0, 2),
    "demographic_parity_ratio": (0, 1),
    "paper_code_disparity": (0, 1),
}
