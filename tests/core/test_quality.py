"""Scores and feature distances against closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from popalign_core.assessment.quality import (
    _Features,  # pyright: ignore[reportPrivateUsage]
    clip_score,
    compare_scores,
    estimate_score,
    frechet_distance,
    kernel_distance,
)
from popalign_core.errors import InvalidInput


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def standardized(images: int, dims: int) -> np.ndarray:
    """Features of exactly mean 0 and covariance 1."""
    drawn = rng().normal(size=(images, dims))
    drawn -= drawn.mean(axis=0)
    return drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T


@pytest.mark.parametrize(("degrees", "score"), [(0, 100), (60, 50), (90, 0), (150, 0)])
def test_clip_score_is_the_cosine_in_percent_from_zero(degrees, score):
    angle = np.radians(degrees)
    image, text = np.array([[3.0, 0.0]]), 7 * np.array([[np.cos(angle), np.sin(angle)]])
    assert clip_score(image, text)[0] == pytest.approx(score, abs=1e-9)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_clip_score_ignores_lengths(first, second):
    image, text = rng().normal(size=(2, 6, 5))
    np.testing.assert_allclose(clip_score(first * image, second * text), clip_score(image, text), atol=1e-9)


def test_score_is_the_mean_over_images_with_an_interval_over_prompts():
    levels = np.repeat(rng().normal(30, 3, size=50), 8)
    values = levels + rng(2).normal(0, 1, size=400)
    prompt_ids = [f"p{i // 8}" for i in range(400)]
    found = estimate_score(values, prompt_ids, rng=rng(), resamples=1000)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    # 3.92 standard errors of 50 prompts' means; images alone would give less than half of it.
    width = 3.92 * values.reshape(50, 8).mean(axis=1).std() / np.sqrt(50)
    assert (found.high - found.low) / width == pytest.approx(1, abs=0.12)


def test_paired_scores_find_a_small_relative_change_between_unlike_prompts():
    levels = np.repeat(rng().normal(30, 5, size=40), 6)
    before = levels + rng(2).normal(0, 0.5, size=240)
    after = 0.98 * levels + rng(3).normal(0, 0.5, size=240)
    ids = [f"p{i // 6}" for i in range(240)]
    found = compare_scores(before, after, ids, rng=rng(), resamples=500)
    assert found.ratio.value == pytest.approx(after.mean() / before.mean())
    assert found.ratio.low < found.ratio.value < found.ratio.high < 1
    assert found.ratio.high - found.ratio.low < 0.02


def test_sides_may_differ_in_images_but_not_in_prompts():
    before, after = np.array([1.0, 3.0, 5.0]), np.array([2.0, 4.0])
    found = compare_scores(before, after, ["a", "a", "b"], ["b", "a"], rng=rng(), resamples=50)
    assert found.difference.value == 0
    with pytest.raises(InvalidInput, match="not paired"):
        compare_scores(before, after, ["a", "a", "b"], ["b", "c"], rng=rng())
    with pytest.raises(InvalidInput, match="do not pair"):
        estimate_score(before, ["a"], rng=rng())


def test_frechet_distance_of_gaussians_with_known_moments():
    features = standardized(400, 4)
    shift, scale = np.array([1.0, -2.0, 0.0, 0.5]), np.array([1.0, 2.0, 0.5, 3.0])
    other = features * scale + shift
    # Diagonal covariances: |shift|^2 + sum (1 - scale)^2.
    expected = np.square(shift).sum() + np.square(1 - scale).sum()
    assert frechet_distance(features, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(other, features) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(features, features[::-1].copy()) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_fewer_images_than_dims_is_that_of_torchmetrics():
    """The covariances have rank 11 and 8 then; torchmetrics takes roots of eigenvalues that rounding leaves near 0."""
    one, other = rng().normal(size=(12, 40)), rng(2).normal(0.3, 1.5, size=(9, 40))
    metric = FrechetInceptionDistance(feature=_Features(40))
    for features, real in ((one, True), (other, False)):
        metric.update(torch.from_numpy(features), real=real)
    assert frechet_distance(one, other) == pytest.approx(float(metric.compute()), rel=1e-4)
    assert frechet_distance(one, one[::-1].copy()) == pytest.approx(0, abs=1e-9)
    line = np.zeros((3, 8))
    line[:, 0] = [-1.0, 0.0, 1.0]
    moved = 2 * line
    moved[:, 0] += 3
    assert frechet_distance(line, moved) == pytest.approx(3**2 + (1 - 2) ** 2)


def test_kernel_distance_of_two_points_and_of_one_distribution():
    # Constant features x and y: k(x, x) + k(y, y) - 2 k(x, y), k = (x.y / 2 + 1)^3.
    x, y = np.tile([2.0, 0.0], (20, 1)), np.tile([0.0, 2.0], (20, 1))
    found = kernel_distance(x, y, seed=0, subsets=5)
    assert (found.value, found.low, found.high) == pytest.approx((27 + 27 - 2, 52, 52))
    one, same = rng().normal(size=(2, 600, 8))
    near = kernel_distance(one, same, seed=0)
    assert near.low < 0 < near.high
    assert kernel_distance(one, same + 1, seed=0).low > near.high


def test_kernel_distance_follows_its_seed_and_leaves_torchs_alone():
    one, other = rng().normal(size=(2, 300, 4))
    state = torch.get_rng_state()
    first = kernel_distance(one, other, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert kernel_distance(one, other, seed=3) == first
    assert kernel_distance(one, other, seed=4) != first


@pytest.mark.parametrize(("first", "second"), [((1, 4), (9, 4)), ((9, 4), (9, 3)), ((9,), (9,))])
def test_distances_refuse_features_that_do_not_pair(first, second):
    with pytest.raises(InvalidInput, match="two images"):
        frechet_distance(np.zeros(first), np.zeros(second))
    with pytest.raises(InvalidInput, match="two images"):
        kernel_distance(np.zeros(first), np.zeros(second), seed=0)


def test_clip_score_refuses_features_that_do_not_pair():
    with pytest.raises(InvalidInput, match="do not pair"):
        clip_score(np.zeros((2, 3)), np.zeros((3, 3)))
