"""A classifier's errors: by hand, against the inverse matrix, and intervals that cover."""

import numpy as np
import pytest

from popalign_core.assessment.corrected_shares import AuditedPopulation, confusion_cells, correct_shares
from popalign_core.assessment.misclassification import (
    CANNOT_TELL,
    AuditedLabels,
    adjusted_count,
    confusion,
    plurality,
    post_stratified,
    predictive_matrix,
    worst_case,
)
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

AXIS = Axis("pair", ("a", "b"))
# Rows: perceived a, b, no person. Columns: predicted a, b, no person, unknown.
ERRORS = np.array([[0.85, 0.07, 0.02, 0.06], [0.15, 0.75, 0.02, 0.08], [0.03, 0.02, 0.9, 0.05]])


def test_adjusted_count_is_the_inverse_matrix_where_that_has_shares():
    truth = np.array([0.7, 0.25, 0.05])
    predicted = truth @ ERRORS
    np.testing.assert_allclose(adjusted_count(predicted, ERRORS), truth, atol=1e-6)
    square = np.array([[0.9, 0.1], [0.2, 0.8]])
    np.testing.assert_allclose(
        adjusted_count(np.array([0.6, 0.4]), square), [0.6, 0.4] @ np.linalg.inv(square), atol=1e-6
    )


def test_adjusted_count_never_leaves_the_shares():
    square = np.array([[0.9, 0.1], [0.2, 0.8]])
    # The inverse matrix would give -0.14.
    found = adjusted_count(np.array([0.1, 0.9]), square)
    np.testing.assert_allclose(found, [0.0, 1.0], atol=1e-6)


def test_what_people_never_perceived_has_no_share():
    found = adjusted_count(np.array([0.5, 0.5]), np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0], atol=1e-9)


def test_rows_weigh_by_inclusion_and_count_effective_images():
    labels = AuditedLabels(AXIS, np.array([0, 0, 0]), np.array([0, 1, CANNOT_TELL]), np.array([3.0, 1.0, 4.0]))
    rows = labels.rows()
    np.testing.assert_allclose(predictive_matrix(rows)[0], [0.75, 0.25, 0.0])
    assert rows[0].sum() == pytest.approx(16 / 10)
    assert labels.untold()[0] == 0.5
    assert labels.counts[0, 0] == 1
    assert labels.counts.sum() == 2


def test_bayes_and_post_stratification_by_hand():
    predictive = np.array([[0.8, 0.2, 0], [0.1, 0.9, 0], [0, 0, 1], [0.5, 0.5, 0]])
    predicted = np.array([0.5, 0.3, 0.1, 0.1])
    np.testing.assert_allclose(post_stratified(predicted, predictive), [0.48, 0.42, 0.1])
    np.testing.assert_allclose(confusion(predictive, predicted)[0], [0.4 / 0.48, 0.03 / 0.48, 0, 0.05 / 0.48])


def test_worst_case_bounds():
    low, high = worst_case(np.array([30.0, 10.0]), 10.0)
    np.testing.assert_allclose([low, high], [[0.6, 0.2], [0.8, 0.4]])
    low, high = worst_case(np.zeros(2), 0.0)
    assert (low.tolist(), high.tolist()) == ([0, 0], [1, 1])


def test_plurality():
    assert plurality([1, 1, 0]) == 1
    assert plurality([1, 0]) == CANNOT_TELL
    assert plurality([CANNOT_TELL, 0]) == 0
    assert plurality([CANNOT_TELL]) == CANNOT_TELL


def drawn_population(rng: np.random.Generator, truth: np.ndarray, audited: int = 25) -> AuditedPopulation:
    """15 prompts of 40 images with shares that differ, classified by ERRORS, so many audited of each prediction."""
    shares = rng.dirichlet(25 * truth, size=15)
    perceived = np.stack([rng.choice(3, size=40, p=own) for own in shares])
    predicted = (rng.random((15, 40, 1)) > ERRORS.cumsum(axis=1)[perceived]).sum(axis=-1)
    counts = np.stack([np.bincount(row, minlength=4) for row in predicted])
    chosen, weights = [], []
    for outcome in range(4):
        where = np.flatnonzero(predicted == outcome)
        taken = rng.permutation(where)[:audited]
        chosen += taken.tolist()
        weights += [len(where) / max(len(taken), 1)] * len(taken)
    flat = (predicted.ravel()[chosen], perceived.ravel()[chosen], np.array(weights))
    return AuditedPopulation(counts, AuditedLabels(AXIS, *flat))


def test_corrected_intervals_cover_and_uncorrected_ones_do_not():
    """Known shares of 15 prompts in 100 simulations; below 88% of them by chance: 1 in 200 for 95% intervals."""
    truths = {"base": np.array([0.85, 0.1, 0.05]), "round-1": np.array([0.45, 0.45, 0.1])}
    covered: dict[tuple[str, str], list[bool]] = {}
    for simulation in range(100):
        rng = np.random.default_rng([7, simulation])
        populations = {name: drawn_population(rng, truth) for name, truth in truths.items()}
        for row in correct_shares(populations, seed=simulation, resamples=200):
            if row.group == "b":
                truth = truths[row.model_id][1] / truths[row.model_id][:2].sum()
                covered.setdefault((row.model_id, row.method), []).append(row.low <= truth <= row.high)
    rates = {key: float(np.mean(hits)) for key, hits in covered.items()}
    for model in truths:
        assert rates[model, "post_stratified"] >= 0.88
        assert rates[model, "adjusted_count"] >= 0.88
    assert rates["base", "as_classified"] < 0.6


def test_rows_say_what_they_rest_on():
    rng = np.random.default_rng(3)
    populations = {"base": drawn_population(rng, np.array([0.6, 0.35, 0.05]), audited=10)}
    rows = correct_shares(populations, seed=0, resamples=200)
    assert {row.method: row.audited for row in rows} == {
        "as_classified": 0,
        "post_stratified": len(populations["base"].labels.predicted),
        "adjusted_count": len(populations["base"].labels.predicted),
    }
    for row in rows:
        assert row.low <= row.share <= row.high
        assert row.bound_low <= row.share + 1e-9
        assert row.n == 600
    assert rows == correct_shares(populations, seed=0, resamples=200)
    # With one model, both corrections solve the same equations.
    corrected = [[row.share for row in rows if row.method == m] for m in ("post_stratified", "adjusted_count")]
    np.testing.assert_allclose(*corrected, atol=1e-4)


def test_cells_of_a_row_sum_to_one():
    populations = {"base": drawn_population(np.random.default_rng(4), np.array([0.6, 0.3, 0.1]))}
    cells = confusion_cells(populations, seed=0, resamples=200)
    assert len(cells) == 3 * 4
    for name in ("a", "b", "no person"):
        own = [cell for cell in cells if cell.perceived == name]
        assert sum(cell.share for cell in own) == pytest.approx(1)
        assert sum(cell.count for cell in own) == own[0].n > 0
        assert all(cell.low <= cell.share <= cell.high for cell in own)


def test_nothing_told_is_refused():
    nothing = AuditedLabels(AXIS, np.array([0]), np.array([CANNOT_TELL]), np.array([1.0]))
    with pytest.raises(InvalidInput, match="nothing to correct by"):
        correct_shares({"base": AuditedPopulation(np.array([[3, 1, 0, 0]]), nothing)}, seed=0)
