"""Disparities with their intervals, by prompt, as the mean over prompts and pooled; see `resampling` for the method."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from popalign_core.assessment.disparity import MEASURES, RANGES, Measure, l2_discrepancy
from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    LEVELS,
    UNBOUNDED,
    Bootstrap,
    Comparison,
    Estimate,
    moved,
    resample_images,
    resample_prompts,
)
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed

_NAMES = {measure: name for name, measure in MEASURES.items()}


@dataclass(frozen=True)
class DisparityRow:
    """One measured disparity. level: prompt, mean (over prompts) or pooled; prompt_id: of level `prompt` only."""

    level: str
    prompt_id: str | None
    axis: str
    measure: str
    target: str
    value: float
    low: float
    high: float
    floor: float | None
    n: int
    unknown: int


@dataclass(frozen=True, eq=False)
class DrawnCounts:
    """Counts (prompts, groups) of prompts with a known image, and the same resampled (resamples, prompts, groups)."""

    counts: np.ndarray
    drawn: np.ndarray
    unknown: int
    target: np.ndarray

    @classmethod
    def of(
        cls, counts: np.ndarray, unknown: int, target: np.ndarray, *, rng: np.random.Generator, resamples: int
    ) -> "DrawnCounts":
        """Draws prompts, then images. Raises: InvalidInput."""
        known = _checked(counts, target)[counts.sum(axis=-1) > 0]
        if not len(known):
            return cls(known, np.zeros((resamples, 0, len(target)), dtype=np.int64), unknown, target)
        picks = resample_prompts(len(known), rng, resamples)
        return cls(known, resample_images(known, picks, rng), unknown, target)

    def mean(self, measure: Measure) -> Bootstrap:
        """The mean over prompts; its floor is the mean of the prompts' floors."""
        value = float(_known_mean(measure(self.counts, self.target)))
        resampled = _known_mean(measure(self.drawn, self.target))
        return self._bootstrap(measure, value, resampled, self.counts.sum(axis=-1))

    def pooled(self, measure: Measure) -> Bootstrap:
        """The measure of all images together."""
        pooled = self.counts.sum(axis=0)
        value = float(measure(pooled, self.target))
        return self._bootstrap(measure, value, measure(self.drawn.sum(axis=1), self.target), pooled.sum(keepdims=True))

    def _bootstrap(self, measure: Measure, value: float, resampled: np.ndarray, sizes: np.ndarray) -> Bootstrap:
        limits = RANGES.get(_NAMES.get(measure, ""), UNBOUNDED)
        floor = _floor(sizes, self.target) if measure is l2_discrepancy else None
        return Bootstrap(value, moved(value, resampled, limits), int(self.counts.sum()), self.unknown, floor)


def estimate_prompt(
    counts: np.ndarray,
    unknown: int,
    target: np.ndarray,
    measure: Measure,
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Estimate:
    """One prompt's population, counts (groups,), by resampling its images. One of a single group has no width."""
    return estimate_pooled(counts[None], unknown, target, measure, rng=rng, resamples=resamples)


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
        DrawnCounts(counts[both], resample_images(counts[both], picks, rng), left_out, target).mean(measure)
        for counts, left_out in zip((before, after), unknown, strict=True)
    ]
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


def measure_disparities(
    counts_by_prompt: Mapping[str, tuple[np.ndarray, int]],
    axis: Axis,
    target: np.ndarray,
    *,
    seed: int,
    resamples: int = DEFAULT_RESAMPLES,
) -> list[DisparityRow]:
    """Every measure for each prompt, for the mean over prompts and pooled; the same in any order of the prompts.

    counts_by_prompt: counts (groups,) and the number of unknown images. target: shares (groups,). Raises: InvalidInput.
    """
    prompt_ids = sorted(counts_by_prompt)
    if not prompt_ids:
        raise InvalidInput("no prompt to measure a disparity on.")
    counts = np.stack([counts_by_prompt[prompt_id][0] for prompt_id in prompt_ids])
    target_name = "uniform" if np.allclose(target, axis.uniform()) else "given"
    found: list[tuple[str, str | None, str, Estimate]] = []
    for prompt_id, own in zip(prompt_ids, counts, strict=True):
        rng = np.random.default_rng(derive_seed(seed, "disparity", axis.name, prompt_id))
        drawn = DrawnCounts.of(own[None], counts_by_prompt[prompt_id][1], target, rng=rng, resamples=resamples)
        found += [("prompt", prompt_id, name, drawn.pooled(measure).estimate) for name, measure in MEASURES.items()]
    rng = np.random.default_rng(derive_seed(seed, "disparities", axis.name))
    unknown = sum(counts_by_prompt[prompt_id][1] for prompt_id in prompt_ids)
    drawn = DrawnCounts.of(counts, unknown, target, rng=rng, resamples=resamples)
    found += [("mean", None, name, drawn.mean(measure).estimate) for name, measure in MEASURES.items()]
    found += [("pooled", None, name, drawn.pooled(measure).estimate) for name, measure in MEASURES.items()]
    return [
        DisparityRow(level, prompt_id, axis.name, name, target_name, e.value, e.low, e.high, e.floor, e.n, e.unknown)
        for level, prompt_id, name, e in found
    ]


def _checked(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    if counts.ndim != 2 or counts.shape[1:] != target.shape or (counts < 0).any():
        raise InvalidInput(f"counts of shape {counts.shape} do not belong to a target of shape {target.shape}.")
    return counts


def _known_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not nan; nan if nothing is left."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.where(count > 0, np.where(known, values, 0).sum(axis=-1) / np.maximum(count, 1), np.nan)


def _floor(sizes: np.ndarray, target: np.ndarray) -> float:
    """sqrt((1 - sum q^2) / n), which is `sampling_floor` where the target q is uniform; mean over the prompts."""
    if not sizes.size or not sizes.all():
        return np.nan
    floors: np.ndarray = np.sqrt((1 - np.square(target).sum()) / sizes)
    return float(floors.mean())
