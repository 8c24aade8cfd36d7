"""Shares of groups in all prompts together, with intervals over prompts: images of one prompt resemble each other."""

import numpy as np
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.resampling import LEVELS, Estimate
from popalign_core.assessment.win_rate import wilson_at

FEW = 5


def pooled_shares(counts: np.ndarray) -> list[Estimate]:
    """Each group's share of all images, with Wilson's 95% interval at the effective number of images.

    counts (prompts, groups); prompts without an image are left out. A group's images are worth n / d independent ones,
    d = V / (p (1 - p) / n) >= 1, with V the variance of the share over prompts as clusters. Of a group with fewer than
    `FEW` images, or without as many of others, V says little, and the mean d of all groups stands in. Where one group
    is alone nothing is known of d, and n becomes the number of prompts. The quantile is Student's, prompts - 1 degrees
    of freedom. One prompt says nothing of others: (0, 1). All nan without an image.
    Source: Korn & Graubard (1998), as `win_rate.clustered_share`; mean design effect: Rao & Scott (1981).
    """
    counts = counts[counts.sum(axis=1) > 0].astype(float)
    prompts, total = len(counts), counts.sum()
    if not prompts:
        return [Estimate(np.nan, np.nan, np.nan, 0)] * counts.shape[1]
    shares = counts.sum(axis=0) / total
    if prompts == 1:
        return [Estimate(float(share), 0.0, 1.0, int(total)) for share in shares]
    departures = counts - shares * counts.sum(axis=1, keepdims=True)
    variances = prompts / (prompts - 1) * np.square(departures).sum(axis=0) / total**2
    independent = shares * (1 - shares) / total
    if not independent.sum() > 0:
        effects = np.full(len(shares), total / prompts)
    else:
        own = np.divide(variances, independent, out=np.zeros(len(shares)), where=independent > 0)
        few = np.minimum(counts.sum(axis=0), total - counts.sum(axis=0)) < FEW
        effects = np.maximum(np.where(few, variances.sum() / independent.sum(), own), 1)
    quantile = float(stats.t.ppf(LEVELS[1] / 100, prompts - 1))
    ends = [wilson_at(float(p), float(total / d), quantile) for p, d in zip(shares, effects, strict=True)]
    return [Estimate(float(p), *interval, int(total)) for p, interval in zip(shares, ends, strict=True)]
