"""Scores by group and how far groups are apart: what fairlearn says, and what its intervals do not."""

import numpy as np
import pytest

from popalign_core.assessment.metric_frame import CI_QUANTILES, metric_frame
from popalign_core.errors import InvalidInput

GROUPS = ("woman", "man", "other")


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def frame(values, groups, prompts, **more):
    return metric_frame(np.asarray(values, float), groups, prompts, GROUPS, rng=rng(), **more)


def test_names_and_values_are_those_of_fairlearn():
    """fairlearn 0.15: MetricFrame(metrics=mean_prediction, ...) of these rows has these numbers."""
    found = frame([1, 2, 3, 6, 9], ["woman", "woman", "woman", "man", "man"], list("ababa"), n_boot=50)
    by_group = {name: None if one is None else one.value for name, one in found.by_group.items()}
    assert by_group == {"woman": 2.0, "man": 7.5, "other": None}
    assert found.overall.value == pytest.approx(4.2)
    assert found.difference is not None
    assert found.ratio is not None
    assert (found.difference.value, found.ratio.value) == (5.5, pytest.approx(2 / 7.5))
    assert (found.group_min, found.group_max) == (2.0, 7.5)
    assert (found.n_boot, found.ci_quantiles) == (50, CI_QUANTILES)
    assert CI_QUANTILES == (0.025, 0.975)


def test_unknown_images_are_counted_and_in_no_group():
    found = frame([1, 2, 100], ["woman", "man", None], list("aab"), n_boot=20)
    assert (found.overall.value, found.overall.n, found.overall.unknown) == (1.5, 2, 1)


def test_one_group_alone_has_no_difference():
    found = frame([1, 2], ["woman", "woman"], list("ab"), n_boot=20)
    assert (found.difference, found.ratio, found.null_high) == (None, None, None)


def test_a_mean_below_zero_has_no_ratio():
    found = frame([-1, 2, -1, 2], ["woman", "man"] * 2, list("aabb"), n_boot=20)
    assert found.ratio is None
    assert found.difference is not None
    assert found.difference.value == 3.0


def test_a_difference_that_is_there_lies_above_what_chance_gives_and_in_its_interval():
    prompts, groups = np.repeat(np.arange(40), 20), np.tile(["woman", "man"], 400)
    values = rng().normal(0, 3, 40)[prompts] + rng(2).normal(10, 1, 800) + (groups == "man")
    found = frame(values, list(groups), prompts)
    assert found.difference is not None
    assert found.null_high is not None
    assert found.difference.low < 1 < found.difference.high
    assert found.null_high < found.difference.low


def test_alike_groups_pass_what_chance_gives_in_one_of_twenty():
    """Groups that are found in other prompts do not differ by that: shuffles stay within prompts."""
    passed = 0
    for seed in range(200):
        prompts = np.repeat(np.arange(12), 10)
        groups = np.where(rng(seed).random(120) < 0.15 + 0.06 * prompts, "man", "woman")
        values = rng(1000 + seed).normal(0, 1, 120) + prompts
        found = metric_frame(values, list(groups), prompts, GROUPS, rng=rng(seed), n_boot=2)
        assert found.difference is not None
        assert found.null_high is not None
        passed += found.difference.value > found.null_high
    # 95% of binomial(200, .05) lies within 4 and 16.
    assert 4 <= passed <= 16


@pytest.mark.parametrize(
    ("values", "groups", "prompts", "said"),
    [
        ([1, 2], ["woman"], ["a", "a"], "do not pair"),
        ([1], ["male"], ["a"], "'male' is no group"),
        ([1], [None], ["a"], "none of 1 images"),
    ],
)
def test_bad_input_is_said(values, groups, prompts, said):
    with pytest.raises(InvalidInput, match=said):
        frame(values, groups, prompts)
