"""Shares of votes with intervals over prompts: votes on one prompt resemble each other."""

import numpy as np
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.resampling import LEVELS, Estimate
from popalign_core.errors import InvalidInput


def clustered_share(values: np.ndarray, prompt_ids: np.ndarray) -> Estimate:
    """The mean vote with Wilson's 95% interval at the effective number of votes.

    values: (votes,) between 0 and 1; a tie counts one half. prompt_ids: (votes,). n: votes.
    The effective number n* = p (1 - p) / V, with V the variance of the mean over prompts as clusters, is at most n;
    where all votes are alike it is the number of prompts. The quantile is Student's with prompts - 1 degrees of
    freedom. One prompt says nothing of others: its interval is (0, 1).
    Source: Korn & Graubard (1998), Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data; Wilson's form as in Kott & Carr (1997). Raises: InvalidInput.
    """
    if values.ndim != 1 or values.shape != prompt_ids.shape or not ((values >= 0) & (values <= 1)).all():
        raise InvalidInput(f"votes {values.shape} must be shares, with a prompt each; got {prompt_ids.shape} prompts.")
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan, 0)
    share = float(values.mean())
    _, positions = np.unique(prompt_ids, return_inverse=True)
    prompts = int(positions.max()) + 1
    if prompts == 1:
        return Estimate(share, 0.0, 1.0, len(values))
    departures = np.bincount(positions, weights=values - share)
    variance = prompts / (prompts - 1) * np.square(departures).sum() / len(values) ** 2
    spread = share * (1 - share)
    effective = min(len(values), spread / variance) if variance > 0 and spread > 0 else len(values)
    quantile = float(stats.t.ppf(LEVELS[1] / 100, prompts - 1))
    low, high = wilson_at(share, effective if spread > 0 else prompts, quantile)
    return Estimate(share, low, high, len(values))


def wilson_at(share: float, n: float, quantile: float) -> tuple[float, float]:
    """Wilson's interval of a share at an effective number n, which need not be whole."""
    square = quantile**2
    centre, half = share + square / (2 * n), quantile * np.sqrt(share * (1 - share) / n + square / (4 * n**2))
    return max(0.0, float((centre - half) / (1 + square / n))), min(1.0, float((centre + half) / (1 + square / n)))
