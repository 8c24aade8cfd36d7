"""Agreement of raters who did not all see the same units: Krippendorff's alpha for nominal values."""

import numpy as np

from popalign_core.assessment.resampling import DEFAULT_RESAMPLES, LEVELS, Estimate
from popalign_core.errors import InvalidInput

MISSING = -1


def krippendorff_alpha(codes: np.ndarray) -> float:
    """1 = all agree, 0 = as by chance, below 0 = less than by chance; nan where nothing can be compared.

    codes: (units, raters) integers, MISSING where a rater gave no value. Units with fewer than two values do not count.
    It is nan, too, where only one value was ever given: chance would agree as well.
    Source: Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, nominal metric. Raises: InvalidInput.
    """
    return float(_alpha(_value_counts(codes)))


def estimate_alpha(codes: np.ndarray, *, rng: np.random.Generator, resamples: int = DEFAULT_RESAMPLES) -> Estimate:
    """Alpha with a 95% interval from drawing units again. n: units with at least two values. Raises: InvalidInput."""
    counts = _value_counts(codes)
    if not len(counts):
        return Estimate(np.nan, np.nan, np.nan, 0)
    drawn = _alpha(counts[rng.integers(len(counts), size=(resamples, len(counts)))])
    known = drawn[np.isfinite(drawn)]
    low, high = np.percentile(known, LEVELS) if known.size else (np.nan, np.nan)
    return Estimate(float(_alpha(counts)), float(low), float(high), len(counts))


def _value_counts(codes: np.ndarray) -> np.ndarray:
    """(pairable units, values): how often each value was given."""
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
        raise InvalidInput(f"codes must be integers (units, raters), got {codes.dtype} of shape {codes.shape}.")
    values = np.unique(codes[codes >= 0])
    counts = (codes[:, :, None] == values).sum(axis=1)
    return counts[counts.sum(axis=1) >= 2]


def _alpha(counts: np.ndarray) -> np.ndarray:
    """For every leading index of counts (..., units, values)."""
    per_unit = counts.sum(axis=-1)
    n = per_unit.sum(axis=-1)
    pairs = (np.square(per_unit) - np.square(counts).sum(axis=-1)) / np.maximum(per_unit - 1, 1)
    observed = pairs.sum(axis=-1) / np.maximum(n, 1)
    totals = counts.sum(axis=-2)
    expected = (np.square(n) - np.square(totals).sum(axis=-1)) / np.maximum(n * (n - 1), 1)
    return np.where(expected > 0, 1 - observed / np.where(expected > 0, expected, 1), np.nan)
