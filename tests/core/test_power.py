"""The planned power against a closed form, and what cannot be planned."""

import numpy as np
import pytest
from scipy.stats import nct, t  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.power import POWER, detection
from popalign_core.errors import InvalidInput

TARGET = np.array([0.5, 0.5])
LEANING = np.tile([0.8, 0.2], (12, 1))


def test_the_power_is_that_of_a_paired_t_test() -> None:
    found = detection(LEANING, TARGET, 0.1, 40, seed=1)
    # Two groups, far from the target: L2 is sqrt(2) |p - 1/2|, and its variance 2 p (1 - p) / n on each side.
    after = 0.8 - 0.1 / np.sqrt(2)
    error = np.sqrt(2 * (0.8 * 0.2 + after * (1 - after)) / 40 / len(LEANING))
    freedom = len(LEANING) - 1
    exact = nct.cdf(-t.ppf(0.975, freedom), freedom, -0.1 / error)
    assert found.disparity == pytest.approx(0.3 * np.sqrt(2))
    assert found.power == pytest.approx(exact, abs=0.09)  # 3 standard errors


def test_the_needed_images_are_the_fewest_that_reach_the_power(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popalign_core.assessment.power.SIMULATIONS", 40)
    needed = detection(LEANING, TARGET, 0.1, 40, seed=1).needed
    assert needed is not None
    assert detection(LEANING, TARGET, 0.1, needed, seed=1).power >= POWER
    assert detection(LEANING, TARGET, 0.1, int(0.9 * needed), seed=1).power < POWER


def test_prompts_that_move_unlike_are_not_helped_by_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("popalign_core.assessment.power.SIMULATIONS", 40)
    unlike = np.array([[1.0, 0.0], [0.52, 0.48]])
    assert detection(unlike, TARGET, 0.1, 40, seed=1).needed is None


@pytest.mark.parametrize(
    ("shares", "change", "message"),
    [(LEANING, 0.6, "it can fall"), (LEANING, 0.0, "it can fall"), (LEANING[:1], 0.1, "two or more")],
)
def test_what_cannot_be_planned_is_refused(shares: np.ndarray, change: float, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        detection(shares, TARGET, change, 40, seed=1)
