import math

import numpy as np
import pytest

from popalign_core.assessment.seed_spread import sampling_variance, seed_spread
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput


def test_three_seeds_by_hand() -> None:
    found = seed_spread([0.2, 0.3, 0.4], 0.0)
    assert (found.seeds, found.mean, found.deviation) == (3, pytest.approx(0.3), pytest.approx(0.1))
    # Student's t with two degrees of freedom: 4.303 at 97.5%.
    assert found.high - found.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert (found.best, found.worst) == (0.2, 0.4)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    drawn = [seed_spread(rng.normal(0.3, 0.05, 4).tolist(), 0.0) for _ in range(2000)]
    covered = np.mean([found.low <= 0.3 <= found.high for found in drawn])
    # Standard deviation of the share sqrt(.95 * .05 / 2000) = .0049; four of them.
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[], [0.3], [0.3, math.nan]])
def test_one_seed_has_no_spread(values: list[float]) -> None:
    with pytest.raises(InvalidInput, match="two or more"):
        seed_spread(values, 0.0)


AXIS = AXES["perceived_gender"]


def drawn_labels(share: float, noise: np.ndarray) -> list[str]:
    """A model that draws its first group where the image's own noise is below that group's share."""
    return [AXIS.groups[int(value >= share)] for value in noise]


def test_images_alone_leave_nothing_between_the_seeds() -> None:
    """Models that are all the same, on images of their own: what is left between them is 0 in half of the cases."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(200):
        models = [{prompt: drawn_labels(0.8, rng.random(20)) for prompt in ("a", "b", "c")} for _ in range(4)]
        values = [
            np.mean([abs(own.count(AXIS.groups[0]) / 20 - 0.5) * 2**0.5 for own in model.values()]) for model in models
        ]
        found.append(seed_spread(values, sampling_variance(models, AXIS, rng, 100)))
    # Hedges' estimate of no variance is below 0, and cut off, a little more often than not (chi squared is skewed).
    assert 0.45 < np.mean([spread.between == 0 for spread in found]) < 0.75
    assert np.mean([spread.between_low == 0 for spread in found]) > 0.93
    observed = np.mean([spread.deviation**2 for spread in found])
    assert np.mean([spread.sampling**2 for spread in found]) == pytest.approx(observed, rel=0.2)


def test_the_same_images_cancel() -> None:
    labels = {"a": ["man", "man", "woman", None]}
    assert sampling_variance([labels, labels], AXIS, np.random.default_rng(0)) == pytest.approx(0.0)


def test_the_interval_between_seeds_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    drawn = [seed_spread(rng.normal(0.3, (0.04**2 + 0.03**2) ** 0.5, 4).tolist(), 0.03**2) for _ in range(2000)]
    covered = np.mean([found.between_low <= 0.04 <= found.between_high for found in drawn])
    assert covered == pytest.approx(0.95, abs=0.02)
