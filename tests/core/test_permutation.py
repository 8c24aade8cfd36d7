"""Permutation tests: their level, their power, ties, and p-values that are corrected for many prompts."""

import numpy as np
import pytest
from scipy.stats import binom

from popalign_core.assessment.permutation import prompt_changes
from popalign_core.attributes import AXES

GENDER, TONE = AXES["perceived_gender"], AXES["perceived_skin_tone"]


def labels(rng: np.random.Generator, axis, prompts: int, images: int, shares) -> dict[str, list[str]]:
    return {f"p{i}": [axis.groups[k] for k in rng.choice(len(axis.groups), images, p=shares)] for i in range(prompts)}


def test_one_prompt_by_hand():
    # Ten pairs, six of which turn from man to woman: 10:0 against 4:6. Swapping leaves L2 = |women - 5| sqrt(2) / 10.
    (row, mean) = prompt_changes(
        {"p": ["man"] * 10}, {"p": ["man"] * 4 + ["woman"] * 6}, GENDER, seed=0, permutations=100_000
    )
    assert (row.n, row.changed) == (10, 6)
    assert row.difference == pytest.approx((1 - 5) * np.sqrt(2) / 10)
    # k of six swapped: sides have k and 6 - k women.
    reached = [abs(abs(k - 5) - abs(6 - k - 5)) >= 4 for k in range(7)]
    assert row.p_value == pytest.approx(binom.pmf(np.arange(7), 6, 0.5)[reached].sum(), abs=0.005)
    assert row.p_holm == row.p_benjamini_hochberg == row.p_value
    assert (mean.prompt_id, mean.p_holm) == (None, None)
    assert np.isnan(mean.p_value)


def test_no_change_is_found_at_the_level_and_few_survive_holm():
    """60 prompts of which none changed: under 5% of p-values below .05, and none after Holm but in 1 of 20 seeds."""
    rng = np.random.default_rng(2)
    before, after = (labels(rng, TONE, 60, 40, np.full(5, 0.2)) for _ in range(2))
    *rows, mean = prompt_changes(before, after, TONE, seed=1, permutations=999)
    p = np.array([row.p_value for row in rows])
    assert (p < 0.05).mean() <= 0.12  # binomial(60, .05): beyond 7 in 1 of 200 seeds
    assert p.mean() == pytest.approx(0.5, abs=0.15)
    assert min(row.p_holm for row in rows) > 0.05
    assert all(row.p_value <= row.p_benjamini_hochberg <= row.p_holm <= 1 for row in rows)
    assert mean.p_value > 0.01


def test_a_change_everywhere_is_found_and_unknowns_stay_pairs():
    rng = np.random.default_rng(3)
    before = labels(rng, GENDER, 8, 40, [0.95, 0.05])
    after = labels(rng, GENDER, 8, 40, [0.5, 0.5])
    before["p0"] = [None] * 40
    *rows, mean = prompt_changes(before, after, GENDER, seed=1, permutations=999)
    assert np.isnan(rows[0].p_value)
    assert np.isnan(rows[0].p_holm)
    assert rows[0].changed == 40
    assert all(row.p_holm < 0.05 for row in rows[1:])
    # Seven prompts all fell: 2 of 128 ways to swap sides.
    assert mean.p_value == pytest.approx(2 / 128)
    assert mean.difference == pytest.approx(np.mean([row.difference for row in rows[1:]]))
