"""Shares of groups over prompts: by hand, and how often the interval holds the share of many more prompts."""

import numpy as np
import pytest

from popalign_core.assessment.pooled_shares import pooled_shares

SIMULATIONS = 2000


@pytest.mark.parametrize(
    ("evenness", "groups"), [((2.0, 2.0), 2), ((8.0, 8.0), 2), ((30.0, 30.0), 2), ((3.0, 2.0, 1.0, 0.5), 4)]
)
def test_the_interval_covers_the_share_of_more_prompts(evenness, groups):
    source, prompts, images = np.random.default_rng(3), 16, 40
    truth = np.array(evenness) / sum(evenness)
    held = np.zeros(groups)
    for _ in range(SIMULATIONS):
        found = pooled_shares(source.multinomial(images, source.dirichlet(evenness, size=prompts)))
        held += [one.low <= share <= one.high for one, share in zip(found, truth, strict=True)]
    assert ((held / SIMULATIONS >= 0.93) & (held / SIMULATIONS <= 0.97)).all(), held / SIMULATIONS


def test_alike_prompts_are_worth_their_images_and_unlike_ones_are_not():
    alike, unlike = np.tile([20, 20], (16, 1)), np.array([[40, 0], [0, 40]] * 8)
    (narrow, _), (wide, _) = pooled_shares(alike), pooled_shares(unlike)
    assert (narrow.value, wide.value, narrow.n) == (0.5, 0.5, 640)
    assert narrow.high - narrow.low < 0.1
    # Sixteen draws of all or nothing: 2.13 standard errors of 1/8 each way, a little less by Wilson's form.
    assert 0.4 < wide.high - wide.low < 0.55


def test_a_group_that_never_occurs_has_an_interval_of_the_width_that_others_teach():
    unlike = np.array([[40, 0, 0], [0, 40, 0]] * 8)
    *_, never = pooled_shares(unlike)
    assert never.value == 0
    assert 0.2 < never.high < 0.25  # as of 16 images, and not of 640
    alone = pooled_shares(np.array([[40, 0]] * 16))
    assert 0.2 < alone[1].high < 0.25


def test_of_one_prompt_nothing_is_known_of_others():
    assert [(one.value, one.low, one.high) for one in pooled_shares(np.array([[3, 1]]))] == [(0.75, 0, 1), (0.25, 0, 1)]
    assert np.isnan(pooled_shares(np.zeros((2, 3)))[0].value)
