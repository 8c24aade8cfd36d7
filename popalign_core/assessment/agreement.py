"""How far two classifiers agree on the same images: Cohen's kappa and the share of equal labels, with intervals.

    kappa = (p_o - p_e) / (1 - p_e)                                              Cohen (1960)

p_o: share of images with the same group by both. p_e: what two classifiers with these shares of groups would agree on
by chance. At the same share of errors kappa is the lower the more one group prevails, so it is read beside p_o. Images
of all prompts are pooled; intervals by drawing prompts, then images (`resampling`).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    Bootstrap,
    Estimate,
    moved,
    resample_images,
    resample_prompts,
)
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

Labels = Sequence[str | None]


def cohen_kappa(counts: np.ndarray) -> np.ndarray:
    """Of tables (..., groups, groups), one classifier in rows; nan where both name one and the same group alone."""
    total = np.maximum(counts.sum(axis=(-2, -1)), 1)
    observed = observed_agreement(counts)
    chance = (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1) / np.square(total.astype(float))
    below = 1 - chance
    defined = below > 1e-12
    return np.where(defined, (observed - chance) / np.where(defined, below, 1), np.nan)


def observed_agreement(counts: np.ndarray) -> np.ndarray:
    """Share of the images of tables (..., groups, groups) that lie on the diagonal; nan without an image."""
    total = counts.sum(axis=(-2, -1))
    equal = np.trace(counts, axis1=-2, axis2=-1)
    return np.where(total > 0, equal / np.maximum(total, 1), np.nan)


MEASURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], tuple[float, float]]] = {
    "cohen_kappa": (cohen_kappa, (-1.0, 1.0)),
    "observed_agreement": (observed_agreement, (0.0, 1.0)),
}


def agreement(
    axis: Axis,
    by_prompt: Mapping[str, tuple[Labels, Labels]],
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> dict[str, Estimate]:
    """Both measures of the labels of two classifiers; the same in any order of the prompts.

    by_prompt: for every prompt the labels of its images by either, in the same order; None = no group, and the image
    is counted as unknown. Raises: InvalidInput, UnknownName.
    """
    tables = [_table(axis, *by_prompt[prompt]) for prompt in sorted(by_prompt)]
    if not tables:
        raise InvalidInput(f"no image that two classifiers labelled on {axis.name}.")
    counts = np.stack(tables)
    unknown = sum(len(first) for first, _ in by_prompt.values()) - int(counts.sum())
    known = counts[counts.sum(axis=(-2, -1)) > 0]
    if len(known):
        picks = resample_prompts(len(known), rng, resamples)
        cells = resample_images(known.reshape(len(known), -1), picks, rng).sum(axis=1)
        drawn = cells.reshape(resamples, *counts.shape[1:])
    else:
        drawn = np.zeros((resamples, *counts.shape[1:]), dtype=np.int64)
    return {
        name: _estimate(measure, limits, counts.sum(axis=0), drawn, unknown)
        for name, (measure, limits) in MEASURES.items()
    }


def _table(axis: Axis, first: Labels, second: Labels) -> np.ndarray:
    groups = len(axis.groups)
    counts = np.zeros((groups, groups), dtype=np.int64)
    for one, other in zip(first, second, strict=True):
        if one is not None and other is not None:
            counts[axis.index(one), axis.index(other)] += 1
    return counts


def _estimate(
    measure: Callable[[np.ndarray], np.ndarray],
    limits: tuple[float, float],
    counts: np.ndarray,
    drawn: np.ndarray,
    unknown: int,
) -> Estimate:
    value = float(measure(counts))
    return Bootstrap(value, moved(value, measure(drawn), limits), int(counts.sum()), unknown).estimate
