import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from popalign_core.attributes import AXES
from popalign_core.classification import AxisProbabilities, Status, attribute, softmax

GENDER = AXES["perceived_gender"]


def outcome_of(rows: list[list[float]], no_person: list[float]) -> AxisProbabilities:
    return AxisProbabilities(GENDER, np.array(rows), np.array(no_person))


def test_no_person_comes_before_low_confidence_and_that_before_ok() -> None:
    outcome = outcome_of([[0.9, 0.1], [0.55, 0.45], [0.9, 0.1], [0.55, 0.45]], [0.1, 0.1, 0.9, 0.9])
    found = [(row.status, row.label) for row in attribute(outcome, min_confidence=0.6)]
    assert found == [
        (Status.OK, "man"),
        (Status.LOW_CONFIDENCE, "man"),
        (Status.NO_PERSON, None),
        (Status.NO_PERSON, None),
    ]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_probability_that_is_no_number_is_an_error_and_no_group(broken: float) -> None:
    rows = attribute(outcome_of([[broken, 0.1], [0.9, 0.1]], [0.0, broken]), min_confidence=0.6)
    assert [(row.status, row.label, row.confidence) for row in rows] == [(Status.ERROR, None, 0.0)] * 2


@given(shares=arrays(float, (7, 2), elements=st.floats(0, 1)), sure=st.floats(0, 1), absent=st.floats(0, 1))
def test_every_image_has_a_row_and_only_a_sure_one_is_ok(shares: np.ndarray, sure: float, absent: float) -> None:
    rows = attribute(AxisProbabilities(GENDER, shares, np.full(7, absent)), min_confidence=sure)
    assert len(rows) == 7
    for row, values in zip(rows, shares, strict=True):
        assert row.probabilities == tuple(values)
        assert (row.status is Status.OK) == (absent <= 0.5 and values.max() >= sure)


@given(logits=arrays(float, (3, 5), elements=st.floats(-1e4, 1e4)))
def test_softmax_rows_are_shares_in_the_order_of_the_logits(logits: np.ndarray) -> None:
    shares = softmax(logits)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert (np.take_along_axis(shares, logits.argsort(axis=1), axis=1) >= 0).all()
    assert (np.diff(np.take_along_axis(shares, logits.argsort(axis=1), axis=1), axis=1) >= 0).all()
