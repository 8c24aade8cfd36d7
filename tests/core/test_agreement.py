"""Cohen's kappa against a library, its interval against simulation, and what counts as unknown."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_cohen_kappa

from popalign_core.assessment.agreement import agreement, cohen_kappa
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput

TONE, GENDER = AXES["perceived_skin_tone"], AXES["perceived_gender"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60))
def test_kappa_is_that_of_torchmetrics(pairs: list[tuple[int, int]]) -> None:
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    counts = np.zeros((5, 5), dtype=np.int64)
    np.add.at(counts, (first.numpy(), second.numpy()), 1)
    expected = float(multiclass_cohen_kappa(second, first, num_classes=5))
    found = float(cohen_kappa(counts))
    if len({*pairs}) == 1 and pairs[0][0] == pairs[0][1]:
        assert np.isnan(found)  # by chance alone they agree always: nothing is known
    else:
        assert found == pytest.approx(expected, abs=1e-5)


def labels(rng: np.random.Generator, images: int, right: float) -> tuple[list[str], list[str]]:
    """Two judges of even groups, each right with this probability on its own."""
    truth = rng.integers(0, 2, images)
    said = [np.where(rng.random(images) < right, truth, 1 - truth) for _ in range(2)]
    return [GENDER.groups[label] for label in said[0]], [GENDER.groups[label] for label in said[1]]


def test_the_interval_holds_the_true_kappa_in_about_95_of_100_draws() -> None:
    # Agree: both right or both wrong. Groups are even, so p_e = 1/2.
    right = 0.9
    true = (right**2 + (1 - right) ** 2 - 0.5) / 0.5
    inside = 0
    for draw in range(60):
        rng = np.random.default_rng(draw)
        by_prompt = {f"p{prompt}": labels(rng, 20, right) for prompt in range(12)}
        kappa = agreement(GENDER, by_prompt, rng=rng, resamples=400)["cohen_kappa"]
        inside += kappa.low <= true <= kappa.high
        assert kappa.low <= kappa.value <= kappa.high
    # Slightly conservative (`resampling`): fewer than 53 of 60 has a probability below 3% at 95%.
    assert inside >= 53


def test_unknown_images_are_counted_and_left_out() -> None:
    by_prompt = {"a": (["man", "woman", None, None], ["man", "man", "man", None]), "b": ([None], ["woman"])}
    found = agreement(GENDER, by_prompt, rng=np.random.default_rng(0), resamples=200)
    for estimate in found.values():
        assert (estimate.n, estimate.unknown) == (2, 3)
    assert found["observed_agreement"].value == 0.5
    assert found["cohen_kappa"].value == pytest.approx(0.0)


def test_the_order_of_prompts_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    by_prompt = {f"p{prompt}": labels(rng, 9, 0.8) for prompt in range(5)}
    found = [
        agreement(GENDER, dict(order), rng=np.random.default_rng(1), resamples=200)
        for order in (by_prompt.items(), reversed(by_prompt.items()))
    ]
    assert found[0] == found[1]


def test_nothing_known_is_no_number_and_no_prompt_an_error() -> None:
    found = agreement(TONE, {"a": ([None], ["light"])}, rng=np.random.default_rng(0), resamples=200)
    assert all(np.isnan(estimate.value) and estimate.n == 0 for estimate in found.values())
    with pytest.raises(InvalidInput, match="no image"):
        agreement(TONE, {}, rng=np.random.default_rng(0))
