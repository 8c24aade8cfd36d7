"""How much of a result is the luck of the training seed, and how much that of the images it is measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, t  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

RESAMPLES = 400
Labels = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class SeedSpread:
    """A measure over trainings that differ in their seed alone: the seed as a random effect.

    deviation: standard deviation over seeds, n - 1. low, high: 95% interval of the mean over seeds, by Student's t: of
    this data, not of other prompts or images. best, worst: smallest and largest. sampling: the standard deviation over
    seeds that images alone would give. between: what the trained models differ by beyond it, with its 95% interval.
    """

    seeds: int
    mean: float
    deviation: float
    low: float
    high: float
    best: float
    worst: float
    sampling: float
    between: float
    between_low: float
    between_high: float


def seed_spread(values: Sequence[float], sampling_variance: float) -> SeedSpread:
    """values: one a seed, at least two. sampling_variance: as the function of this name gives it.

    The variance between seeds is what is left of the observed one (Hedges' estimate for equal sampling variances), its
    interval where the observed one is likely (Q-profile, Viechtbauer 2007); below 0 is 0. Raises: InvalidInput.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        raise InvalidInput(f"a spread over seeds needs two or more measured values, got {list(values)}.")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    freedom = len(values) - 1
    half = float(t.ppf(0.975, freedom)) * deviation / len(values) ** 0.5
    scales = (1.0, freedom / float(chi2.ppf(0.975, freedom)), freedom / float(chi2.ppf(0.025, freedom)))
    between, between_low, between_high = (max(scale * deviation**2 - sampling_variance, 0.0) ** 0.5 for scale in scales)
    return SeedSpread(
        seeds=len(values),
        mean=mean,
        deviation=deviation,
        low=mean - half,
        high=mean + half,
        best=min(values),
        worst=max(values),
        sampling=sampling_variance**0.5,
        between=between,
        between_low=between_low,
        between_high=between_high,
    )


def sampling_variance(
    labels: Sequence[Labels], axis: Axis, rng: np.random.Generator, resamples: int = RESAMPLES
) -> float:
    """Variance over seeds that the images alone give to the mean L2 discrepancy over prompts.

    labels: of each trained model, by prompt; position by position from the same noise, so that positions are drawn for
    all models together and what they have in common cancels. Raises: InvalidInput.
    """
    prompts = sorted(labels[0])
    if any(sorted(own) != prompts for own in labels):
        raise InvalidInput("the models were not measured on the same prompts.")
    changes = np.zeros((len(labels), resamples))
    for prompt in prompts:
        known = np.array([[[label == group for group in axis.groups] for label in own[prompt]] for own in labels])
        picks = rng.integers(0, known.shape[1], (resamples, known.shape[1]))
        drawn = np.stack([model[picks].sum(axis=1) for model in known])
        measured = l2_discrepancy(known.sum(axis=1), axis.uniform())[:, None]
        # A draw without any known label says nothing of the prompt: as measured.
        changes += np.nan_to_num(l2_discrepancy(drawn, axis.uniform()) - measured) / len(prompts)
    return float(changes.var(axis=0, ddof=1).mean())
