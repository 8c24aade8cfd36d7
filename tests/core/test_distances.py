"""Distances between two models' images: closed forms, and how often chance alone passes the stated limit."""

import math

import numpy as np
import pytest

from popalign_core.assessment.distances import DISTANCES, SWAPS, cmmd, distance_to_base, group_distance
from popalign_core.errors import InvalidInput
from popalign_core.quality_config import SCORERS


def test_cmmd_of_two_points_is_the_kernel_by_hand() -> None:
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-2 / 200)))
    assert cmmd(a, a) == 0.0


def test_cmmd_is_the_mean_kernel_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(1, 1, (4, 3))

    def mean(x, y):
        return np.mean([math.exp(-((p - q) ** 2).sum() / 200) for p in x for q in y])

    assert cmmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def test_every_scorer_names_distances_that_can_be_computed() -> None:
    assert {name for kind in SCORERS.values() for name in kind.distances} <= set(DISTANCES)
    assert all(bool(kind.unit) != bool(kind.distances) for kind in SCORERS.values())


@pytest.mark.parametrize("measure", ["cmmd", "fd_dinov2", "kid"])
def test_another_distribution_passes_what_swapped_sides_give(measure: str) -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(60, 4))
    found = distance_to_base(measure, base, base + rng.normal(1.0, 0.3, base.shape), seed=0)
    assert found.value > found.null_high > found.null_mean
    same = distance_to_base(measure, base, base.copy(), seed=0)
    assert same.value == pytest.approx(same.null_high, abs=1e-6)
    assert found.n == 60


def test_without_an_effect_the_limit_is_passed_once_in_twenty_times() -> None:
    passed = 0
    for run in range(400):
        rng = np.random.default_rng(run)
        noise = rng.normal(size=(20, 2))  # what two images of one seed have in common
        base, aligned = (noise + rng.normal(size=(20, 2)) for _ in range(2))
        found = distance_to_base("cmmd", base, aligned, seed=run)
        passed += found.value > found.null_high
    # Binomial(400, 1 / 20): mean 20, standard deviation 4.4.
    assert SWAPS == 19
    assert 7 <= passed <= 33


def test_of_a_group_the_sides_need_not_be_alike_in_number() -> None:
    rng = np.random.default_rng(1)
    base, far, near = rng.normal(size=(40, 3)), rng.normal(1, 1, (25, 3)), rng.normal(size=(25, 3))
    found = group_distance("fd_dinov2", base, far, seed=0)
    assert (found.n_base, found.n_aligned) == (40, 25)
    assert found.value == pytest.approx(DISTANCES["fd_dinov2"](base, far, 0))
    assert found.value > found.null_high > found.null_mean
    same = group_distance("fd_dinov2", base, near, seed=0)
    assert same.value < 2 * same.null_high


def test_a_group_with_one_image_has_no_distance() -> None:
    found = group_distance("cmmd", np.zeros((1, 3)), np.zeros((5, 3)), seed=0)
    assert (found.value, found.null_mean, found.null_high, found.n_base, found.n_aligned) == (None, None, None, 1, 5)


def test_of_a_group_chance_passes_the_limit_once_in_twenty_times() -> None:
    passed = 0
    for run in range(400):
        rng = np.random.default_rng(run)
        found = group_distance("cmmd", rng.normal(size=(12, 2)), rng.normal(size=(20, 2)), seed=run)
        passed += found.value > found.null_high
    assert 7 <= passed <= 33


def test_images_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InvalidInput, match="same two or more images"):
        distance_to_base("cmmd", np.zeros((3, 2)), np.zeros((4, 2)), seed=0)
