"""95% intervals by a cluster bootstrap: prompts are drawn with replacement, then images within each drawn prompt.

Images of one prompt resemble each other, so images alone would give intervals that are too narrow. Drawing both counts
the noise of images twice, as the spread between prompts already holds it, and few prompts vary less than many. So the
resampled values of a mean over prompts are scaled to the jackknife's standard error over prompts, times Student's
quantile over the normal one (prompts - 1 degrees of freedom).

Intervals are percentiles of the resampled values, moved so that their mean is the measured value. A resample is one
more draw of n images, so it lies further from an even target than what was measured (near it by a factor of sqrt(2) for
the L2 discrepancy); without the move, intervals of small disparities would lie wholly above the measured value.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.stats import t  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.errors import InvalidInput

LEVELS = (2.5, 97.5)
DEFAULT_RESAMPLES = 2000
UNBOUNDED = (-np.inf, np.inf)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, all nan where nothing was measured.

    n: known images that it is made from; unknown: those left out. floor: what sampling alone would show of a population
    on target, None where the measure has no known one.
    """

    value: float
    low: float
    high: float
    n: int
    unknown: int = 0
    floor: float | None = None


@dataclass(frozen=True)
class Comparison:
    """The same thing before and after, paired over prompts. difference: after - before; ratio: after / before.

    n and unknown of difference and ratio are those of both sides together.
    """

    before: Estimate
    after: Estimate
    difference: Estimate
    ratio: Estimate


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """One statistic: its value, its resampled values (resamples,) moved to it, and what it was made from.

    without: the value without each prompt in turn, (prompts,), of a statistic whose interval is over prompts; then the
    interval is scaled to the jackknife's. limits: what the statistic can be.
    """

    value: float
    resampled: np.ndarray
    n: int
    unknown: int = 0
    floor: float | None = None
    without: np.ndarray | None = None
    limits: tuple[float, float] = UNBOUNDED

    @property
    def estimate(self) -> Estimate:
        """The value with its interval."""
        known = self.resampled[np.isfinite(self.resampled)]
        low, high = np.percentile(known, LEVELS) if known.size else (np.nan, np.nan)
        if known.size and self.without is not None:
            scale = _jackknife_scale(known, self.without)
            low, high = np.clip(self.value + scale * (np.array([low, high]) - self.value), *self.limits)
        return Estimate(float(self.value), float(low), float(high), self.n, self.unknown, self.floor)

    def compared_with(self, before: "Bootstrap") -> Comparison:
        """Before against this. Both need the same prompts in the same resamples."""
        n, unknown = before.n + self.n, before.unknown + self.unknown
        moved_by, times = None, None
        if self.without is not None and before.without is not None:
            moved_by = self.without - before.without
            times = _divided(self.without.astype(float), before.without.astype(float))
        difference = Bootstrap(
            self.value - before.value, self.resampled - before.resampled, n, unknown, without=moved_by
        )
        ratios = _divided(
            np.append(self.resampled, self.value).astype(float), np.append(before.resampled, before.value).astype(float)
        )
        ratio = Bootstrap(float(ratios[-1]), ratios[:-1], n, unknown, without=times)
        return Comparison(before.estimate, self.estimate, difference.estimate, ratio.estimate)


def moved(value: float, resampled: np.ndarray, limits: tuple[float, float] = UNBOUNDED) -> np.ndarray:
    """The resampled values (resamples,) moved so that their mean is the measured value, kept within the limits."""
    if not np.isfinite(value):
        return np.full(resampled.shape, np.nan)
    known = resampled[np.isfinite(resampled)]
    return np.clip(resampled + (value - known.mean() if known.size else 0), *limits)


def resample_prompts(prompts: int, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Positions of the prompts of each resample, (resamples, prompts). Raises: InvalidInput without a prompt."""
    if prompts < 1 or resamples < 1:
        raise InvalidInput(f"an interval needs prompts and resamples, got {prompts} prompts and {resamples} resamples.")
    return rng.integers(prompts, size=(resamples, prompts))


def resample_images(counts: np.ndarray, picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts of the picked populations, their images drawn anew: (prompts, groups) -> (*picks.shape, groups)."""
    total = counts.sum(axis=-1)
    return rng.multinomial(total[picks], (counts / np.maximum(total, 1)[:, None])[picks])


def estimate_ratio(
    sums: np.ndarray,
    weights: np.ndarray,
    picks: np.ndarray,
    *,
    unknown: int = 0,
    limits: tuple[float, float] = UNBOUNDED,
) -> Bootstrap:
    """A mean over images, sum of sums / sum of weights, both (prompts,): the images of a prompt are drawn together.

    weights: images of each prompt. picks: (resamples, prompts).
    """
    value = float(_divided(np.asarray(sums.sum(), dtype=float), np.asarray(weights.sum(), dtype=float)))
    resampled = _divided(sums[picks].sum(axis=1).astype(float), weights[picks].sum(axis=1).astype(float))
    without = _divided((sums.sum() - sums).astype(float), (weights.sum() - weights).astype(float))
    return Bootstrap(value, resampled, int(weights.sum()), unknown, without=without, limits=limits)


def sums_by_prompt(values: np.ndarray, prompt_ids: np.ndarray) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Sorted prompt ids, the sums of their images' values and their numbers of images. Raises: InvalidInput."""
    if values.ndim != 1 or values.shape != prompt_ids.shape or not len(values):
        raise InvalidInput(f"values of shape {values.shape} and prompt ids of shape {prompt_ids.shape} do not pair.")
    names, positions = np.unique(prompt_ids, return_inverse=True)
    weights = np.bincount(positions, minlength=len(names))
    return names.tolist(), np.bincount(positions, weights=values, minlength=len(names)), weights


def require_same_prompts(before: list[str], after: list[str]) -> None:
    """Raises: InvalidInput unless both sides were measured on the same prompts."""
    if before != after:
        other = sorted(set(before) ^ set(after))
        raise InvalidInput(
            f"before and after are not paired: {len(other)} prompts are on one side only, as {other[:3]}."
        )


def _jackknife_scale(resampled: np.ndarray, without: np.ndarray) -> float:
    """What makes deviations of resampled values those of Student's t with the jackknife's standard error.

    1 where there are fewer than two prompts, or nothing varies. Prompts that happen to agree do not make an interval
    narrower than half the bootstrap's: of counts, two or three can agree exactly.
    """
    known = without[np.isfinite(without)]
    spread = float(resampled.std())
    if len(known) < 2 or not spread > 0:
        return 1.0
    error = np.sqrt((len(known) - 1) / len(known) * np.square(known - known.mean()).sum())
    quantiles = float(t.ppf(LEVELS[1] / 100, len(known) - 1)) / NormalDist().inv_cdf(LEVELS[1] / 100)
    return max(float(error) / spread * quantiles, 0.5)


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
