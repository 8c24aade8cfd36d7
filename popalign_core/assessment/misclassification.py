"""A classifier's errors from an audited sample, and group shares corrected for them.

Audited images are drawn at random within strata of what the classifier predicted, with known inclusion probabilities,
and labelled by people. What people perceive is the reference here; it is no truth about anyone.

Predicted outcomes are the axis's groups, "no person" and "unknown" (low confidence, error). Perceived ones are the
groups and "no person"; "cannot tell" is a missing label, which the bounds take at its worst.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

NO_PERSON, UNKNOWN = "no person", "unknown"
CANNOT_TELL = -1
_EM_STEPS, _EM_TOLERANCE = 2000, 1e-8


def predicted_outcomes(axis: Axis) -> tuple[str, ...]:
    """What a classifier can say of an image, in order."""
    return (*axis.groups, NO_PERSON, UNKNOWN)


def perceived_outcomes(axis: Axis) -> tuple[str, ...]:
    """What a person can say of an image, in order; "cannot tell" is none of them."""
    return (*axis.groups, NO_PERSON)


@dataclass(frozen=True, eq=False)
class AuditedLabels:
    """Audited images of one axis.

    predicted, perceived: (images,) positions among the outcomes; perceived is CANNOT_TELL where people could not.
    weights: (images,) 1 / inclusion probability. Raises: InvalidInput.
    """

    axis: Axis
    predicted: np.ndarray
    perceived: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if not self.predicted.shape == self.perceived.shape == self.weights.shape or not (self.weights > 0).all():
            raise InvalidInput("every audited image needs a predicted, a perceived outcome and a weight above 0.")

    def chosen(self, mask: np.ndarray) -> "AuditedLabels":
        """Those images alone."""
        return AuditedLabels(self.axis, self.predicted[mask], self.perceived[mask], self.weights[mask])

    @property
    def counts(self) -> np.ndarray:
        """Images, unweighted, (perceived, predicted)."""
        known = self.perceived != CANNOT_TELL
        found = np.zeros((len(perceived_outcomes(self.axis)), len(predicted_outcomes(self.axis))), dtype=np.int64)
        np.add.at(found, (self.perceived[known], self.predicted[known]), 1)
        return found

    def rows(self) -> np.ndarray:
        """Dirichlet parameters of P(perceived | predicted), (predicted, perceived), prior left out.

        Weighted shares times the effective number of images (sum w)^2 / sum w^2, which is their number where all of a
        row have one inclusion probability.
        """
        shape = (len(predicted_outcomes(self.axis)), len(perceived_outcomes(self.axis)))
        known = self.perceived != CANNOT_TELL
        sums, squares = np.zeros(shape), np.zeros(shape[0])
        np.add.at(sums, (self.predicted[known], self.perceived[known]), self.weights[known])
        np.add.at(squares, self.predicted[known], self.weights[known] ** 2)
        totals = sums.sum(axis=1)
        effective = np.divide(totals, squares, out=np.zeros(shape[0]), where=squares > 0)
        return sums * effective[:, None]

    def untold(self) -> np.ndarray:
        """Weighted share of "cannot tell" for every predicted outcome, (predicted,); 0 where none was audited."""
        size = len(predicted_outcomes(self.axis))
        every = np.bincount(self.predicted, weights=self.weights, minlength=size)
        missing = np.bincount(self.predicted, weights=self.weights * (self.perceived == CANNOT_TELL), minlength=size)
        return np.divide(missing, every, out=np.zeros(size), where=every > 0)


def predictive_matrix(rows: np.ndarray) -> np.ndarray:
    """P(perceived | predicted) of Dirichlet parameters (..., predicted, perceived); 0 where nothing is known."""
    total = rows.sum(axis=-1, keepdims=True)
    return np.divide(rows, total, out=np.zeros(rows.shape), where=total > 0)


def draw_predictive(rows: np.ndarray, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Draws (draws, predicted, perceived) from the posterior under Perks' prior, 1 / outcomes for each.

    A resampled sample would never show a kind of error that the audit happened not to see; the posterior allows it.
    """
    drawn = rng.standard_gamma(rows + 1 / rows.shape[-1], size=(draws, *rows.shape))
    return predictive_matrix(np.maximum(drawn, 1e-300))


def confusion(predictive: np.ndarray, predicted_shares: np.ndarray) -> np.ndarray:
    """P(predicted | perceived), (..., perceived, predicted), by Bayes' rule; 0 where an outcome was never perceived.

    predictive: (..., predicted, perceived). predicted_shares: (..., predicted) of the images that were audited from.
    """
    joint = np.swapaxes(predictive * predicted_shares[..., None], -1, -2)
    total = joint.sum(axis=-1, keepdims=True)
    return np.divide(joint, total, out=np.zeros(joint.shape), where=total > 0)


def post_stratified(predicted_shares: np.ndarray, predictive: np.ndarray) -> np.ndarray:
    """Shares of perceived outcomes, sum over predicted of P(predicted) P(perceived | predicted): (..., perceived).

    For the images that were audited from; it assumes nothing about the classifier. Source: Tenenbein (1970), A double
    sampling scheme for estimating from binomial data with misclassifications.
    """
    return (predicted_shares[..., None] * predictive).sum(axis=-2)


def adjusted_count(predicted_shares: np.ndarray, confusion_matrix: np.ndarray) -> np.ndarray:
    """Shares of perceived outcomes that make the predicted ones likeliest, (..., perceived), within [0, 1].

    Solves predicted = shares @ confusion by expectation maximisation, which is the inverse matrix wherever that gives
    shares of at least 0. It assumes that the classifier errs alike on these images and on those that were audited.
    Source: Buonaccorsi (2010), Measurement Error, chapter 2; "adjusted count" in Forman (2008).
    """
    reached = confusion_matrix.sum(axis=-1) > 0
    start = reached / np.maximum(reached.sum(axis=-1, keepdims=True), 1)
    shares = np.broadcast_to(start, np.broadcast_shapes(start.shape, (*predicted_shares.shape[:-1], 1)))
    for _ in range(_EM_STEPS):
        expected = (shares[..., None, :] @ confusion_matrix)[..., 0, :]
        ratio = predicted_shares / np.where(expected > 0, expected, np.inf)
        moved = shares * (confusion_matrix @ ratio[..., None])[..., 0]
        moved /= moved.sum(axis=-1, keepdims=True)
        settled = np.abs(moved - shares).max() < _EM_TOLERANCE
        shares = moved
        if settled:
            break
    return shares


def among_people(outcome_shares: np.ndarray) -> np.ndarray:
    """Shares of the groups among images with a person, (..., groups), from shares of perceived outcomes."""
    people = outcome_shares[..., :-1]
    total = people.sum(axis=-1, keepdims=True)
    return np.divide(people, total, out=np.full(people.shape, np.nan), where=total > 0)


def worst_case(group_mass: np.ndarray, missing_mass: float) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the groups' shares, (groups,) each, whatever group the missing images are of (Manski 1989).

    group_mass: (groups,) images or shares of known group. missing_mass: those without one, in the same unit.
    """
    total = group_mass.sum() + missing_mass
    if total <= 0:
        return np.zeros(len(group_mass)), np.ones(len(group_mass))
    return group_mass / total, (group_mass + missing_mass) / total


def plurality(answers: Sequence[int]) -> int:
    """The answer that most auditors gave; CANNOT_TELL where two lead or nobody could tell."""
    known = [answer for answer in answers if answer != CANNOT_TELL]
    counts = sorted(((known.count(answer), answer) for answer in set(known)), reverse=True)
    if not counts or (len(counts) > 1 and counts[0][0] == counts[1][0]):
        return CANNOT_TELL
    return counts[0][1]
