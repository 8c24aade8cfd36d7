"""Disparities with their intervals, by prompt, as the mean over prompts and pooled; see `resampling` for the method."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.disparity import MEASURES, RANGES, Measure, l2_discrepancy
from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    LEVELS,
    UNBOUNDED,
    Bootstrap,
    Comparison,
    Estimate,
    estimate_ratio,
    moved,
    resample_images,
    resample_prompts,
)
from popalign_core.errors import InvalidInput

# Images in a cell below which the normal approximation behind Wilson's interval is not trusted.
SMALL_CELL = 5
_NAMES = {measure: name for name, measure in MEASURES.items()}


@dataclass(frozen=True, eq=False)
class DrawnCounts:
    """Counts (prompts, groups) of prompts with a known image, and the same resampled (resamples, prompts, groups).

    target: shares (groups,), or of each prompt (prompts, groups). drawn_target: those of the drawn prompts, to which
    `drawn` broadcasts.
    """

    counts: np.ndarray
    drawn: np.ndarray
    unknown: int
    target: np.ndarray
    drawn_target: np.ndarray

    @classmethod
    def of(
        cls, counts: np.ndarray, unknown: int, target: np.ndarray, *, rng: np.random.Generator, resamples: int
    ) -> "DrawnCounts":
        """Draws prompts, then images. Raises: InvalidInput."""
        there = _checked(counts, target).sum(axis=-1) > 0
        known, own = counts[there], target if target.ndim == 1 else target[there]
        if not len(known):
            nothing = np.zeros((resamples, 0, counts.shape[-1]), dtype=np.int64)
            return cls(known, nothing, unknown, own, own if own.ndim == 1 else nothing.astype(float))
        picks = resample_prompts(len(known), rng, resamples)
        drawn = resample_images(known, picks, rng)
        return cls(known, drawn, unknown, own, own if own.ndim == 1 else own[picks])

    def mean(self, measure: Measure) -> Bootstrap:
        """The mean over prompts; its floor is the mean of the prompts' floors."""
        values = measure(self.counts, self.target)
        resampled = known_mean(measure(self.drawn, self.drawn_target))
        # Without a prompt that has no number itself the mean is the same.
        known = values[~np.isnan(values)]
        without = (known.sum() - known) / max(len(known) - 1, 1) if len(known) > 1 else np.zeros(0)
        return self._bootstrap(measure, float(known_mean(values)), resampled, self.target, without)

    def pooled(self, measure: Measure) -> Bootstrap:
        """The measure of all images together, to the mean of their prompts' targets."""
        counts, target = pool(self.counts, self.target)
        value = float(measure(counts, target))
        resampled = measure(*pool(self.drawn, self.drawn_target))
        return self._bootstrap(measure, value, resampled, target)

    def _bootstrap(
        self,
        measure: Measure,
        value: float,
        resampled: np.ndarray,
        target: np.ndarray,
        without: np.ndarray | None = None,
    ) -> Bootstrap:
        limits = RANGES.get(_NAMES.get(measure, ""), UNBOUNDED)
        sizes = self.counts.sum(axis=-1)
        sizes = sizes.sum(keepdims=True) if without is None else sizes
        floor = _floor(sizes, target) if measure is l2_discrepancy else None
        values = moved(value, resampled, limits)
        return Bootstrap(value, values, int(self.counts.sum()), self.unknown, floor, without, limits)


def pool(counts: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (..., prompts, groups) of all prompts together, and the mean target of their images."""
    if target.ndim == 1:
        return counts.sum(axis=-2), target
    sizes = counts.sum(axis=-1, keepdims=True)
    total = sizes.sum(axis=-2)
    weighted: np.ndarray = (sizes * target).sum(axis=-2)
    mean: np.ndarray = np.divide(weighted, total, out=np.full(weighted.shape, np.nan), where=total > 0)
    return counts.sum(axis=-2), mean


def estimate_mean(
    counts: np.ndarray,
    unknown: int,
    target: np.ndarray,
    measure: Measure,
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Estimate:
    """The mean over prompts of their measure, counts (prompts, groups). Prompts without a known image are left out."""
    return DrawnCounts.of(counts, unknown, target, rng=rng, resamples=resamples).mean(measure).estimate


def estimate_pooled(
    counts: np.ndarray,
    unknown: int,
    target: np.ndarray,
    measure: Measure,
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Estimate:
    """The measure of all prompts' images together, counts (prompts, groups); opposite prompts cancel in it."""
    return DrawnCounts.of(counts, unknown, target, rng=rng, resamples=resamples).pooled(measure).estimate


def compare(
    before: np.ndarray,
    after: np.ndarray,
    target: np.ndarray,
    measure: Measure,
    *,
    unknown: tuple[int, int] = (0, 0),
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Comparison:
    """The mean over prompts before and after, counts (prompts, groups) of the same prompts in the same order.

    Both sides use the same resampled prompts, so that what prompts differ in cancels. Prompts without a known image on
    either side are left out. Raises: InvalidInput.
    """
    if before.shape != after.shape:
        raise InvalidInput(f"before and after are not paired: counts of shapes {before.shape} and {after.shape}.")
    both = (_checked(before, target).sum(axis=-1) > 0) & (_checked(after, target).sum(axis=-1) > 0)
    # nan is known only to the measure: L2 without bias, for one, needs two images.
    both &= ~np.isnan(measure(before, target)) & ~np.isnan(measure(after, target))
    if not both.any():
        picks = np.zeros((resamples, 0), dtype=np.int64)
    else:
        picks = resample_prompts(int(both.sum()), rng, resamples)
    sides = [
        DrawnCounts(counts[both], resample_images(counts[both], picks, rng), left_out, target, target).mean(measure)
        for counts, left_out in zip((before, after), unknown, strict=True)
    ]
    return sides[1].compared_with(sides[0])


def compare_unknown(
    before: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Comparison:
    """The share of images without a group, paired by prompt: each side unknown and all images of prompts (prompts,)."""
    picks = resample_prompts(len(before[0]), rng, resamples)
    sides = [estimate_ratio(unknown, images, picks, limits=(0, 1)) for unknown, images in (before, after)]
    return sides[1].compared_with(sides[0])


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a share of n independent images (Wilson 1927); (0, 1) if n = 0. Raises: InvalidInput."""
    if not 0 <= successes <= n:
        raise InvalidInput(f"{successes} of {n} is not a share.")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(LEVELS[1] / 100)
    share = successes / n
    centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    # Exact in theory at the ends, where rounding leaves 1e-17.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def clopper_pearson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval that covers at least as often as it says, for any n (Clopper & Pearson 1934); (0, 1) if n = 0.

    Raises: InvalidInput.
    """
    if not 0 <= successes <= n:
        raise InvalidInput(f"{successes} of {n} is not a share.")
    tail = 1 - LEVELS[1] / 100
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    return low, 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))


def share_interval(successes: int, n: int) -> tuple[float, float, str]:
    """95% interval of a share and its name: exact where fewer than 5 images are in the group or outside it.

    There Wilson's falls short of 95% for some shares; elsewhere it is the narrower one and holds.
    """
    if min(successes, n - successes) < SMALL_CELL:
        return *clopper_pearson_interval(successes, n), "clopper-pearson"
    return *wilson_interval(successes, n), "wilson"


def known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not nan; nan if nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _checked(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    fits = counts.ndim == 2 and target.shape in (counts.shape, counts.shape[1:])
    if not fits or (counts < 0).any():
        raise InvalidInput(f"counts of shape {counts.shape} do not belong to a target of shape {target.shape}.")
    return counts


def _floor(sizes: np.ndarray, target: np.ndarray) -> float:
    """sqrt((1 - sum q^2) / n), which is `sampling_floor` where the target q is uniform; mean over the prompts."""
    if not sizes.size or not sizes.all():
        return np.nan
    floors: np.ndarray = np.sqrt((1 - np.square(target).sum(axis=-1)) / sizes)
    return float(floors.mean())
