import math

import numpy as np
import pytest

from popalign_core.assessment.seed_spread import seed_spread
from popalign_core.errors import InvalidInput


def test_three_seeds_by_hand() -> None:
    found = seed_spread([0.2, 0.3, 0.4])
    assert (found.seeds, found.mean, found.deviation) == (3, pytest.approx(0.3), pytest.approx(0.1))
    # Student's t with two degrees of freedom: 4.303 at 97.5%.
    assert found.high - found.mean == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert (found.best, found.worst) == (0.2, 0.4)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    drawn = [seed_spread(rng.normal(0.3, 0.05, 4).tolist()) for _ in range(2000)]
    covered = np.mean([found.low <= 0.3 <= found.high for found in drawn])
    # Standard deviation of the share sqrt(.95 * .05 / 2000) = .0049; four of them.
    assert covered == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[], [0.3], [0.3, math.nan]])
def test_one_seed_has_no_spread(values: list[float]) -> None:
    with pytest.raises(InvalidInput, match="two or more"):
        seed_spread(values)
