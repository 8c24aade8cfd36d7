"""A score by perceived group, and how far the groups are apart; names as in fairlearn's MetricFrame.

`by_group`, `overall`, `difference` (largest less smallest group) and `ratio` (smallest by largest) are of the same
meaning as there, between groups. fairlearn draws rows for its intervals; images of one prompt are alike, so here
prompts are drawn, with all their images. And a largest less a smallest is never below 0, so what chance gives stands
beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    LEVELS,
    Bootstrap,
    Estimate,
    estimate_ratio,
    moved,
    resample_prompts,
)
from popalign_core.errors import InvalidInput

SHUFFLES = 199
CI_QUANTILES = (LEVELS[0] / 100, LEVELS[1] / 100)


@dataclass(frozen=True)
class MetricFrame:
    """by_group: the mean of each group's images, None for a group without one. overall: of all images with a group.

    difference, ratio: between the groups that occur; None where that is fewer than two, ratio also where a group's mean
    is not above 0. null_mean, null_high: of the difference, mean and 95th percentile over `SHUFFLES` shuffles of the
    groups among the images of each prompt. n_boot: resamples. ci_quantiles: of all intervals.
    """

    by_group: dict[str, Estimate | None]
    overall: Estimate
    difference: Estimate | None
    ratio: Estimate | None
    null_mean: float | None
    null_high: float | None
    n_boot: int
    ci_quantiles: tuple[float, float] = CI_QUANTILES

    @property
    def group_max(self) -> float | None:
        """The best group's mean."""
        return max((found.value for found in self.by_group.values() if found is not None), default=None)

    @property
    def group_min(self) -> float | None:
        """The worst group's mean."""
        return min((found.value for found in self.by_group.values() if found is not None), default=None)


def metric_frame(
    values: np.ndarray,
    groups: Sequence[str | None],
    prompt_ids: Sequence[str],
    vocabulary: Sequence[str],
    *,
    rng: np.random.Generator,
    n_boot: int = DEFAULT_RESAMPLES,
) -> MetricFrame:
    """Of values (images,), one score an image. groups: as perceived, None = unknown, which is left out and counted.

    Raises: InvalidInput where lengths differ, no image has a group, or a group is not of the vocabulary.
    """
    known = _known(values, groups, prompt_ids, vocabulary)
    sums, weights = _tables(known)
    unknown = len(values) - len(known.scores)
    picks = resample_prompts(len(sums), rng, n_boot)
    by_group = {
        name: _of_group(sums[:, place], weights[:, place], rng, n_boot) for place, name in enumerate(vocabulary)
    }
    overall = estimate_ratio(sums.sum(axis=1), weights.sum(axis=1), picks, unknown=unknown).estimate
    occurring = weights.sum(axis=0) > 0
    if occurring.sum() < 2:
        return MetricFrame(by_group, overall, None, None, None, None, n_boot)
    resampled = _means(sums[picks].sum(axis=1), weights[picks].sum(axis=1))[:, occurring]
    without = _means(sums.sum(axis=0) - sums, weights.sum(axis=0) - weights)[:, occurring]
    means = _means(sums.sum(axis=0), weights.sum(axis=0))[occurring]
    n = int(weights.sum())
    difference = _estimate(np.ptp(means), np.ptp(resampled, axis=1), np.ptp(without, axis=1), n, unknown)
    ratio = None
    if means.min() > 0:
        parts = (means[None], resampled, without)
        value, drawn, left = (part.min(axis=1) / part.max(axis=1) for part in parts)
        ratio = _estimate(float(value[0]), drawn, left, n, unknown, most=1.0)
    null = _shuffled_differences(known, rng)
    high = float(np.quantile(null, 0.95))
    return MetricFrame(by_group, overall, difference, ratio, float(null.mean()), high, n_boot)


class _Known(NamedTuple):
    """Images with a known group, (images,) each: score, place of the group in the vocabulary, number of the prompt."""

    scores: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    groups: int


def _known(
    values: np.ndarray, groups: Sequence[str | None], prompt_ids: Sequence[str], vocabulary: Sequence[str]
) -> _Known:
    if not len(values) == len(groups) == len(prompt_ids):
        raise InvalidInput(f"{len(values)} values, {len(groups)} groups and {len(prompt_ids)} prompts do not pair.")
    if odd := sorted({group for group in groups if group is not None} - set(vocabulary)):
        raise InvalidInput(f"{odd[0]!r} is no group of the axis; groups are {', '.join(vocabulary)}.")
    place = {name: index for index, name in enumerate(vocabulary)}
    known = np.array([group is not None for group in groups], bool)
    if not known.any():
        raise InvalidInput(f"none of {len(values)} images has a known group.")
    columns = np.array([place[group] for group in groups if group is not None])
    _, rows = np.unique(np.asarray(prompt_ids)[known], return_inverse=True)
    return _Known(values[known], columns, rows, len(vocabulary))


def _tables(known: _Known) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of images by prompt and group, (prompts, groups)."""
    shape = int(known.rows.max()) + 1, known.groups
    sums, weights = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (known.rows, known.columns), known.scores)
    np.add.at(weights, (known.rows, known.columns), 1)
    return sums, weights


def _of_group(sums: np.ndarray, weights: np.ndarray, rng: np.random.Generator, n_boot: int) -> Estimate | None:
    """Of the prompts that show the group: others would pass for degrees of freedom."""
    shown = weights > 0
    if not shown.any():
        return None
    picks = resample_prompts(int(shown.sum()), rng, n_boot)
    return estimate_ratio(sums[shown], weights[shown], picks).estimate


def _means(sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Is nan where a group does not occur."""
    return np.divide(sums, weights, out=np.full(sums.shape, np.nan), where=weights > 0)


def _estimate(
    value: float, resampled: np.ndarray, without: np.ndarray, n: int, unknown: int, most: float = np.inf
) -> Estimate:
    # A resample in which a group does not occur knows no difference.
    limits = (0.0, most)
    drawn = moved(value, resampled, limits)
    return Bootstrap(value, drawn, n, unknown, without=without, limits=limits).estimate


def _shuffled_differences(known: _Known, rng: np.random.Generator) -> np.ndarray:
    """(SHUFFLES,): within prompts, so that what differs between prompts stays where it is."""
    by_prompt = np.argsort(known.rows, kind="stable")
    scores, columns, rows = (part[by_prompt] for part in (known.scores, known.columns, known.rows))
    weights = np.bincount(columns, minlength=known.groups)
    found: list[float] = []
    for _ in range(SHUFFLES):
        # Sorted by prompt and a random number: a shuffle inside each prompt.
        order = np.lexsort((rng.random(len(rows)), rows))
        means = _means(np.bincount(columns, weights=scores[order], minlength=known.groups), weights)
        found.append(float(np.nanmax(means) - np.nanmin(means)))
    return np.array(found)
