"""95% intervals by a cluster bootstrap: prompts are drawn with replacement, then images within each drawn prompt.

Images of one prompt resemble each other, so images alone would give intervals that are too narrow. Drawing both is
slightly conservative: the spread between prompts already holds some of the noise of their images.

Intervals are percentiles of the resampled values, moved so that their mean is the measured value. A resample is one
more draw of n images, so it lies further from an even target than what was measured (near it by a factor of sqrt(2) for
the L2 discrepancy); without the move, intervals of small disparities would lie wholly above the measured value.
"""

from dataclasses import dataclass

import numpy as np

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
    """One statistic: its value, its resampled values (resamples,) moved to it, and what it was made from."""

    value: float
    resampled: np.ndarray
    n: int
    unknown: int = 0
    floor: float | None = None

    @property
    def estimate(self) -> Estimate:
        """The value with its percentile interval."""
        known = self.resampled[np.isfinite(self.resampled)]
        low, high = np.percentile(known, LEVELS) if known.size else (np.nan, np.nan)
        return Estimate(float(self.value), float(low), float(high), self.n, self.unknown, self.floor)

    def compared_with(self, before: "Bootstrap") -> Comparison:
        """Before against this. Both need the same prompts in the same resamples."""
        n, unknown = before.n + self.n, before.unknown + self.unknown
        difference = Bootstrap(self.value - before.value, self.resampled - before.resampled, n, unknown)
        ratios = _divided(
            np.append(self.resampled, self.value).astype(float), np.append(before.resampled, before.value).astype(float)
        )
        ratio = Bootstrap(float(ratios[-1]), ratios[:-1], n, unknown)
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


def estimate_ratio(sums: np.ndarray, weights: np.ndarray, picks: np.ndarray, *, unknown: int = 0) -> Bootstrap:
    """A mean over images, sum of sums / sum of weights, both (prompts,): the images of a prompt are drawn together.

    weights: images of each prompt. picks: (resamples, prompts).
    """
    value = float(_divided(np.asarray(sums.sum(), dtype=float), np.asarray(weights.sum(), dtype=float)))
    resampled = _divided(sums[picks].sum(axis=1).astype(float), weights[picks].sum(axis=1).astype(float))
    return Bootstrap(value, resampled, int(weights.sum()), unknown)


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


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
