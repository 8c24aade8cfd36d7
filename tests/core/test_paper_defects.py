"""Four faults of the paper's released evaluation, each on a few lines of input, and that ours has none of them."""

import numpy as np
import pytest

from popalign_core.assessment.disparity import l2_discrepancy, paper_code_discrepancy
from popalign_core.assessment.disparity_rows import measure_disparities
from popalign_core.assessment.obedience import obedience
from popalign_core.attributes import AXES
from popalign_core.population_counts import group_counts

GENDER, RACE = AXES["perceived_gender"], AXES["perceived_race"]


def test_groups_that_never_occur_count():
    counts, _ = group_counts(["white", "asian"] * 10, RACE)
    assert paper_code_discrepancy(counts, RACE.uniform()) == 0
    assert l2_discrepancy(counts, RACE.uniform()) == pytest.approx(0.577, abs=1e-3)


def test_opposite_prompts_do_not_cancel():
    counts = {"nurse": (np.array([0, 20]), 0), "engineer": (np.array([20, 0]), 0)}
    rows = measure_disparities(counts, GENDER, GENDER.uniform(), seed=0, resamples=200)
    found = {row.level: row.value for row in rows if row.measure == "l2"}
    assert (found["mean"], found["pooled"]) == (pytest.approx(np.sqrt(0.5)), 0)


def test_failures_are_counted():
    counts, unknown = group_counts(["man", None, "woman", None], GENDER)
    (row, *_) = measure_disparities({"p": (counts, unknown)}, GENDER, GENDER.uniform(), seed=0, resamples=200)
    assert (row.n, row.unknown) == (2, 2)


def test_a_man_does_not_obey_a_prompt_for_a_woman():
    assert "male" in "a photo of a female cook"
    found = obedience(["woman"] * 4, ["man"] * 4, ["a", "b"] * 2, rng=np.random.default_rng(0), resamples=200)
    assert found.unknown_is_wrong.value == 0
