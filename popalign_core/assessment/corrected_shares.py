"""Group shares corrected for the classifier's errors; the interval holds the audit's and the population's chance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.misclassification import (
    CANNOT_TELL,
    AuditedLabels,
    adjusted_count,
    among_people,
    confusion,
    draw_predictive,
    perceived_outcomes,
    post_stratified,
    predicted_outcomes,
    predictive_matrix,
    worst_case,
)
from popalign_core.assessment.resampling import DEFAULT_RESAMPLES, LEVELS, resample_images, resample_prompts
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed

AS_CLASSIFIED, POST_STRATIFIED, ADJUSTED_COUNT = "as_classified", "post_stratified", "adjusted_count"


@dataclass(frozen=True, eq=False)
class AuditedPopulation:
    """One model's images and those of them that were audited. counts: (prompts, predicted outcomes)."""

    counts: np.ndarray
    labels: AuditedLabels


@dataclass(frozen=True)
class CorrectedShare:
    """Share of a group among a model's images with a person, all prompts together, and its 95% interval.

    bound_low, bound_high: worst case, whatever the images are that have no group. n: images. audited: images whose
    labels the correction rests on, 0 where there is none.
    """

    model_id: str
    group: str
    method: str
    share: float
    low: float
    high: float
    bound_low: float
    bound_high: float
    n: int
    audited: int


@dataclass(frozen=True)
class ConfusionCell:
    """How often images that people perceived as one thing were classified as another, with a 95% interval.

    count: audited images, unweighted, of n that people perceived so. share: P(predicted | perceived), weighted.
    """

    perceived: str
    predicted: str
    count: int
    n: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Predicted shares (predicted,) of one population, and the same drawn anew (draws, predicted)."""

    value: np.ndarray
    draws: np.ndarray


def confusion_cells(
    populations: Mapping[str, AuditedPopulation], *, seed: int, resamples: int = DEFAULT_RESAMPLES
) -> list[ConfusionCell]:
    """Every cell of the classifier's confusion matrix over all models together. Raises: InvalidInput."""
    labels, counts = _pooled(populations)
    drawn = _draw_population(counts, _rng(seed, "confusion", labels), resamples)
    rows = labels.rows()
    value = confusion(predictive_matrix(rows), drawn.value)
    draws = confusion(draw_predictive(rows, _rng(seed, "errors", labels), resamples), drawn.draws)
    low, high = _interval(value, draws)
    cells = labels.counts
    return [
        ConfusionCell(
            perceived, predicted, int(cells[t, p]), int(cells[t].sum()), *(float(x[t, p]) for x in (value, low, high))
        )
        for t, perceived in enumerate(perceived_outcomes(labels.axis))
        for p, predicted in enumerate(predicted_outcomes(labels.axis))
    ]


def correct_shares(
    populations: Mapping[str, AuditedPopulation], *, seed: int, resamples: int = DEFAULT_RESAMPLES
) -> list[CorrectedShare]:
    """Every model's shares as classified, corrected by its own audited images, and by the confusion of all models.

    `post_stratified` rests on the model's own audited images and assumes nothing of the classifier; `adjusted_count` on
    all audited images, and assumes that the classifier errs alike on every model. Prompts, images and audited labels
    are drawn anew for the interval. Raises: InvalidInput.
    """
    pooled, _ = _pooled(populations)
    drawn = {
        name: _draw_population(own.counts, _rng(seed, "population", own.labels, name), resamples)
        for name, own in populations.items()
    }
    sizes = np.array([own.counts.sum() for own in populations.values()], dtype=float)
    together = _Drawn(
        np.average([of.value for of in drawn.values()], axis=0, weights=sizes),
        np.average([of.draws for of in drawn.values()], axis=0, weights=sizes),
    )
    rows = pooled.rows()
    errors = confusion(predictive_matrix(rows), together.value)
    drawn_errors = confusion(draw_predictive(rows, _rng(seed, "errors", pooled), resamples), together.draws)
    found: list[CorrectedShare] = []
    for name, own in populations.items():
        found += _as_classified(name, own, drawn[name])
        if (own.labels.perceived != CANNOT_TELL).any():
            drawn_rows = draw_predictive(own.labels.rows(), _rng(seed, "errors", own.labels, name), resamples)
            found += _post_stratified(name, own, drawn[name], drawn_rows)
        value = adjusted_count(drawn[name].value, errors)
        draws = adjusted_count(drawn[name].draws, drawn_errors)
        missing = float(drawn[name].value @ pooled.untold())
        bounds = worst_case((1 - missing) * value[:-1], missing)
        corrected = (among_people(value), among_people(draws))
        found += _rows(name, ADJUSTED_COUNT, own, len(pooled.predicted), corrected, bounds)
    return found


def _pooled(populations: Mapping[str, AuditedPopulation]) -> tuple[AuditedLabels, np.ndarray]:
    if not populations or not any((own.labels.perceived != CANNOT_TELL).any() for own in populations.values()):
        raise InvalidInput("no audited image has a label that could be told: there is nothing to correct by.")
    parts = [own.labels for own in populations.values()]
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("predicted", "perceived", "weights")]
    return AuditedLabels(parts[0].axis, *joined), np.concatenate([own.counts for own in populations.values()])


def _draw_population(counts: np.ndarray, rng: np.random.Generator, draws: int) -> _Drawn:
    known = counts[counts.sum(axis=-1) > 0]
    picks = resample_prompts(len(known), rng, draws)
    again = resample_images(known, picks, rng).sum(axis=1)
    return _Drawn(known.sum(axis=0) / known.sum(), again / again.sum(axis=-1, keepdims=True))


def _as_classified(name: str, own: AuditedPopulation, drawn: _Drawn) -> list[CorrectedShare]:
    groups = len(own.labels.axis.groups)
    totals = own.counts.sum(axis=0)
    # "unknown" is no outcome that people perceive: without it, the last one is "no person" as elsewhere.
    value, draws = among_people(drawn.value[:-1]), among_people(drawn.draws[..., :-1])
    bounds = worst_case(totals[:groups].astype(float), float(totals[groups:].sum()))
    return _rows(name, AS_CLASSIFIED, own, 0, (value, draws), bounds)


def _post_stratified(name: str, own: AuditedPopulation, drawn: _Drawn, drawn_rows: np.ndarray) -> list[CorrectedShare]:
    predictive, untold = predictive_matrix(own.labels.rows()), own.labels.untold()
    value = among_people(post_stratified(drawn.value, predictive))
    draws = among_people(post_stratified(drawn.draws, drawn_rows))
    known = post_stratified(drawn.value * (1 - untold), predictive)
    bounds = worst_case(known[:-1], float(drawn.value @ untold))
    return _rows(name, POST_STRATIFIED, own, len(own.labels.predicted), (value, draws), bounds)


def _rows(
    name: str,
    method: str,
    own: AuditedPopulation,
    audited: int,
    shares: tuple[np.ndarray, np.ndarray],
    bounds: tuple[np.ndarray, np.ndarray],
) -> list[CorrectedShare]:
    low, high = _interval(*shares)
    columns = zip(shares[0], low, high, *bounds, strict=True)
    numbers = [tuple(float(number) for number in line) for line in columns]
    n = int(own.counts.sum())
    return [
        CorrectedShare(name, group, method, share, low, high, bound_low, bound_high, n, audited)
        for group, (share, low, high, bound_low, bound_high) in zip(own.labels.axis.groups, numbers, strict=True)
    ]


def _interval(value: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the draws, widened to the value where the prior has pushed all of them past it."""
    low, high = np.nanpercentile(draws, LEVELS, axis=0)
    return np.minimum(low, value), np.maximum(high, value)


def _rng(seed: int, what: str, labels: AuditedLabels, *more: str) -> np.random.Generator:
    names: Sequence[str] = ("audit", what, labels.axis.name, *more)
    return np.random.default_rng(derive_seed(seed, *names))
