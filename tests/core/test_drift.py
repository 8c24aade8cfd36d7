"""A model that did not move is called drifted one time in twenty at most; one that moved far, always."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.assessment.drift import Measured, drifted

AXIS = "perceived_gender"


def around(value: float, half: float) -> dict[str, Measured]:
    return {AXIS: Measured(value, value - half, value + half)}


def test_false_alarms_are_as_stated() -> None:
    """4,000 pairs of measurements with the same standard error: 5%, two-sided within 4 standard deviations (1.4%)."""
    rng = np.random.default_rng(1)
    values = rng.normal(0.4, 0.1, (4000, 2))
    alarms = sum(bool(drifted(around(a, 1.96 * 0.1), around(b, 1.96 * 0.1))) for a, b in values) / len(values)
    assert abs(alarms - 0.05) < 0.014


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_it_does_not_matter_which_came_first(a: float, b: float, one: float, two: float) -> None:
    assert bool(drifted(around(a, one), around(b, two))) == bool(drifted(around(b, two), around(a, one)))


def test_the_halves_that_face_each_other_count() -> None:
    before = {AXIS: Measured(0.3, 0.29, 0.6)}
    assert drifted(before, {AXIS: Measured(0.2, 0.1, 0.21)})  # downwards: .01 and .01
    assert not drifted(before, {AXIS: Measured(0.4, 0.3, 0.5)})  # upwards: .3 and .1


def test_only_axes_of_both_are_compared() -> None:
    assert drifted({}, around(0.4, 0.01)) == []
    (found,) = drifted(around(0.2, 0.01) | {"perceived_age": Measured(0, 0, 0)}, around(0.4, 0.02))
    assert (found.axis, found.before.value, found.now.value) == (AXIS, 0.2, 0.4)
    assert abs(found.tolerance - np.hypot(0.01, 0.02)) < 1e-12
