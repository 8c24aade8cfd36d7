"""The same prompts and seeds drawn by two samplers: who changes group, and how far shares and disparity move.

Images of one identity start from the same noise, so the two samplers are compared image by image: what the population
owes to its seeds cancels.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import NormalDist

import numpy as np

from popalign_core.assessment.disparity import l2_discrepancy, sampling_floor
from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    LEVELS,
    Bootstrap,
    moved,
    resample_images,
    resample_prompts,
)
from popalign_core.assessment.uncertainty import wilson_interval
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

SHARE, UNKNOWN, DISPARITY = "share", "unknown", "l2"
# Resamples at a time: of 100 prompts and 12 crossed groups they are 34 MB.
_BLOCK = 250
_Z = NormalDist().inv_cdf(LEVELS[1] / 100)


@dataclass(frozen=True)
class PairedRow:
    """One thing measured on both sides. difference: fast - exact, with its 95% interval.

    measure: `share` of a group; `unknown`, the share of images without a group; `l2`, the mean over prompts of the
    discrepancy to the uniform target. n: pairs, of `share` those with a known group on both sides; unknown: the others.
    floor: of `l2` the sampling floor; else what two draws by one sampler from other seeds would differ by.
    lost, gained: pairs that only the exact or only the fast sampler puts there. flip_rate: (lost + gained) / n; of `l2`
    the share of pairs that change group at all. p_value: McNemar's exact test of lost = gained; of `l2`, which has no
    lost and gained, from the bootstrap.
    """

    axis: str
    group: str | None
    measure: str
    exact: float
    fast: float
    difference: float
    difference_low: float
    difference_high: float
    floor: float
    n: int
    unknown: int
    lost: int | None
    gained: int | None
    flip_rate: float
    flip_low: float
    flip_high: float
    p_value: float


def joint_counts(
    exact: Mapping[str, Sequence[str | None]], fast: Mapping[str, Sequence[str | None]], axis: Axis
) -> np.ndarray:
    """Pairs by prompt, group by the exact sampler and group by the fast one: (prompts, groups + 1, groups + 1) int64.

    exact, fast: perceived groups (None = unknown) of a prompt's images, in the same order; unknown is the last row and
    column. Raises: InvalidInput where the two are not pairs; UnknownName.
    """
    if exact.keys() != fast.keys() or any(len(exact[prompt]) != len(fast[prompt]) for prompt in exact) or not exact:
        raise InvalidInput("the two samplers drew other prompts, or other numbers of images: they are not pairs.")
    groups = len(axis.groups)
    counts = np.zeros((len(exact), groups + 1, groups + 1), dtype=np.int64)
    for row, prompt in enumerate(sorted(exact)):
        for one, other in zip(exact[prompt], fast[prompt], strict=True):
            first, second = (groups if label is None else axis.index(label) for label in (one, other))
            counts[row, first, second] += 1
    return counts


def compare_axis(
    joint: np.ndarray, axis: Axis, *, rng: np.random.Generator, resamples: int = DEFAULT_RESAMPLES
) -> list[PairedRow]:
    """A row a group, one of the unknowns, one of the disparity. joint: as `joint_counts` gives it.

    Intervals by drawing prompts, then pairs within each. That of a share difference is widened to the one of Bonett and
    Price (2012) for independent pairs, and that of a flip rate to Wilson's, where these are wider: with no or few flips
    a bootstrap has no width.
    """
    values = {name: float(value) for name, value in _statistics(joint, axis).items()}
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for block in _blocks(joint, rng, resamples):
        for name, resampled in _statistics(block, axis).items():
            drawn[name].append(resampled)
    resampled = {name: np.concatenate(parts) for name, parts in drawn.items()}
    groups = [*axis.groups, None]
    rows = [_share_row(joint, axis, position, values, resampled) for position in range(len(groups))]
    return [*rows, _disparity_row(joint, axis, values, resampled)]


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for being looked at together (Holm 1979); nan stays and counts as no test."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p == p)
    adjusted, least = list(p_values), 0.0
    for rank, (p, place) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - rank)))
        adjusted[place] = least
    return adjusted


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided exact binomial p-value that both directions are equally likely (McNemar 1947); 1 without a change."""
    changed = lost + gained
    tail = sum(comb(changed, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**changed)


def difference_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95% interval of (gained - lost) / n for independent pairs (Bonett and Price 2012); (-1, 1) if n = 0."""
    if not n:
        return -1.0, 1.0
    a, b = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = _Z * np.sqrt((a + b - (b - a) ** 2) / (n + 2))
    return max(-1.0, float(b - a - half)), min(1.0, float(b - a + half))


def _blocks(joint: np.ndarray, rng: np.random.Generator, resamples: int) -> Generator[np.ndarray]:
    flat = joint.reshape(len(joint), -1)
    for start in range(0, resamples, _BLOCK):
        picks = resample_prompts(len(flat), rng, min(_BLOCK, resamples - start))
        yield resample_images(flat, picks, rng).reshape(*picks.shape, *joint.shape[1:])


def _statistics(joint: np.ndarray, axis: Axis) -> dict[str, np.ndarray]:
    """What is resampled, each (...,), of counts (..., prompts, groups + 1, groups + 1)."""
    groups = len(axis.groups)
    found: dict[str, np.ndarray] = {}
    pooled = joint.sum(axis=-3)
    for position in range(groups + 1):
        n, lost, gained = _flips(pooled, position)
        found[f"difference {position}"] = _divided(gained - lost, n)
        found[f"flips {position}"] = _divided(gained + lost, n)
    known = pooled[..., :groups, :groups]
    n = known.sum(axis=(-2, -1))
    found["flips"] = _divided(n - np.trace(known, axis1=-2, axis2=-1), n)
    sides = [l2_discrepancy(joint[..., :groups, :].sum(axis=-1), axis.uniform())]
    sides.append(l2_discrepancy(joint[..., :, :groups].sum(axis=-2), axis.uniform()))
    both = ~np.isnan(sides[0]) & ~np.isnan(sides[1])
    for name, side in zip(("exact", "fast"), sides, strict=True):
        found[name] = _divided(np.where(both, side, 0.0).sum(axis=-1), both.sum(axis=-1))
    found["moved"] = found["fast"] - found["exact"]
    return found


def _flips(pooled: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs, and those that leave and enter a group, each (...,). The last position: unknown, among all pairs."""
    groups = pooled.shape[-1] - 1
    counted = pooled if position == groups else pooled[..., :groups, :groups]
    stays = counted[..., position, position]
    lost, gained = counted[..., position, :].sum(axis=-1) - stays, counted[..., :, position].sum(axis=-1) - stays
    return counted.sum(axis=(-2, -1)), lost, gained


def _share_row(
    joint: np.ndarray, axis: Axis, position: int, values: Mapping[str, float], resampled: Mapping[str, np.ndarray]
) -> PairedRow:
    group = axis.groups[position] if position < len(axis.groups) else None
    counted = joint if group is None else joint[:, :-1, :-1]
    n, lost, gained = (int(value) for value in _flips(joint.sum(axis=0), position))
    low, high = _interval(values, resampled, f"difference {position}", difference_interval(lost, gained, n))
    flip_low, flip_high = _interval(values, resampled, f"flips {position}", wilson_interval(lost + gained, n))
    return PairedRow(
        axis=axis.name,
        group=group,
        measure=UNKNOWN if group is None else SHARE,
        exact=float(_divided(counted[:, position, :].sum(), n)),
        fast=float(_divided(counted[:, :, position].sum(), n)),
        difference=values[f"difference {position}"],
        difference_low=low,
        difference_high=high,
        floor=_seed_floor(counted, position),
        n=n,
        unknown=int(joint.sum()) - n,
        lost=lost,
        gained=gained,
        flip_rate=values[f"flips {position}"],
        flip_low=flip_low,
        flip_high=flip_high,
        p_value=mcnemar_exact(lost, gained),
    )


def _disparity_row(
    joint: np.ndarray, axis: Axis, values: Mapping[str, float], resampled: Mapping[str, np.ndarray]
) -> PairedRow:
    groups = len(axis.groups)
    known = joint[:, :groups, :groups]
    n = int(known.sum())
    flips = n - int(np.trace(known, axis1=1, axis2=2).sum())
    changes = Bootstrap(values["moved"], moved(values["moved"], resampled["moved"]), n)
    flip_low, flip_high = _interval(values, resampled, "flips", wilson_interval(flips, n))
    sizes = joint[:, :groups, :].sum(axis=(1, 2))
    return PairedRow(
        axis=axis.name,
        group=None,
        measure=DISPARITY,
        exact=values["exact"],
        fast=values["fast"],
        difference=values["moved"],
        difference_low=changes.estimate.low,
        difference_high=changes.estimate.high,
        floor=float(sampling_floor(sizes[sizes > 0], groups).mean()) if sizes.any() else float("nan"),
        n=n,
        unknown=int(joint.sum()) - n,
        lost=None,
        gained=None,
        flip_rate=values["flips"],
        flip_low=flip_low,
        flip_high=flip_high,
        p_value=_bootstrap_p(changes.resampled),
    )


def _interval(
    values: Mapping[str, float], resampled: Mapping[str, np.ndarray], name: str, independent: tuple[float, float]
) -> tuple[float, float]:
    """Of the bootstrap, widened to that of independent pairs."""
    limits = (0.0, 1.0) if name.startswith("flips") else (-1.0, 1.0)
    estimate = Bootstrap(values[name], moved(values[name], resampled[name], limits), 0).estimate
    return float(np.fmin(estimate.low, independent[0])), float(np.fmax(estimate.high, independent[1]))


def _bootstrap_p(changes: np.ndarray) -> float:
    """Twice the share of resampled changes on the other side of 0, one added to both (Davison and Hinkley 1997)."""
    known = changes[np.isfinite(changes)]
    if not known.size:
        return float("nan")
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (known.size + 1))


def _seed_floor(counted: np.ndarray, position: int) -> float:
    """Root mean square difference of a share between two independent draws of the same prompts by the exact sampler.

    sqrt(2 sum n_p s_p (1 - s_p)) / n over prompts p with shares s_p.
    """
    sizes = counted.sum(axis=(1, 2))
    own = counted[:, position, :].sum(axis=-1)
    n = int(sizes.sum())
    share = own / np.maximum(sizes, 1)
    return float(np.sqrt(2 * (sizes * share * (1 - share)).sum()) / n) if n else float("nan")


def _divided(above: np.ndarray, below: np.ndarray | int) -> np.ndarray:
    whole = np.asarray(below, dtype=float)
    return np.divide(above, whole, out=np.full(whole.shape, np.nan), where=whole != 0)
