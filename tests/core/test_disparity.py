"""Bounds, zeros and invariances of the measures, and the sampling floor against simulation."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from popalign_core.assessment.disparity import (
    MEASURES,
    RANGES,
    demographic_parity_difference,
    demographic_parity_ratio,
    jensen_shannon_distance,
    kl_divergence,
    l2_discrepancy,
    normalized_entropy,
    paper_code_discrepancy,
    sampling_floor,
    total_variation,
    unbiased_squared_l2,
    worst_group_ratio,
    worst_group_share,
)

COUNTS = st.lists(st.integers(0, 200), min_size=2, max_size=10).filter(any).map(np.array)
DISTANCES = (l2_discrepancy, total_variation, kl_divergence, jensen_shannon_distance, demographic_parity_difference)


def uniform(groups: int) -> np.ndarray:
    return np.full(groups, 1 / groups)


@st.composite
def counts_and_target(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    counts = draw(COUNTS)
    weights = np.array(draw(st.lists(st.integers(1, 50), min_size=len(counts), max_size=len(counts))))
    return counts, weights / weights.sum()


@given(COUNTS)
def test_bounds_for_a_uniform_target(counts):
    groups = len(counts)
    bounds = {"l2": np.sqrt(1 - 1 / groups), "total_variation": 1 - 1 / groups, "kl_divergence": np.log(groups)}
    for name, bound in bounds.items():
        assert -1e-12 <= MEASURES[name](counts, uniform(groups)) <= bound + 1e-12
    assert -1e-12 <= normalized_entropy(counts, uniform(groups)) <= 1 + 1e-12
    assert 0 <= worst_group_share(counts, uniform(groups)) <= 1 / groups + 1e-12


@given(counts_and_target())
def test_every_measure_stays_in_its_range(case):
    counts, target = case
    assume(counts.sum() > 1)
    for name, (low, high) in RANGES.items():
        assert low - 1e-9 <= MEASURES[name](counts, target) <= high + 1e-9


@pytest.mark.parametrize("groups", [2, 3, 5, 6, 10])
def test_a_collapsed_population_reaches_the_bounds(groups):
    counts = np.eye(groups, dtype=int) * 48
    expected = {
        "l2": np.sqrt(1 - 1 / groups),
        "unbiased_squared_l2": 1 - 1 / groups,
        "total_variation": 1 - 1 / groups,
        "kl_divergence": np.log(groups),
        "jensen_shannon_distance": jensenshannon(np.eye(groups)[0], uniform(groups), base=2),
        "normalized_entropy": 0,
        "worst_group_share": 0,
        "worst_group_ratio": 0,
        "demographic_parity_difference": 1,
        "demographic_parity_ratio": 0,
        "paper_code_disparity": 0,
    }
    assert expected.keys() == MEASURES.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(MEASURES[name](counts, uniform(groups)), np.full(groups, value), atol=1e-12)


@given(counts_and_target(), st.integers(1, 9))
def test_distances_are_zero_exactly_where_counts_are_proportional_to_the_target(case, scale):
    counts, target = case
    assume(counts.all())
    for distance in DISTANCES:
        assert abs(distance(counts * scale, counts / counts.sum())) < 1e-7
        differs = np.abs(counts / counts.sum() - target).max() > 1e-6
        assert (distance(counts, target) > 1e-13) or not differs


@given(counts_and_target(), st.randoms(use_true_random=False))
def test_relabelling_groups_changes_nothing(case, random):
    counts, target = case
    assume(counts.sum() > 1)
    order = np.array(random.sample(range(len(counts)), len(counts)))
    for measure in MEASURES.values():
        np.testing.assert_allclose(measure(counts[order], target[order]), measure(counts, target), atol=1e-12)


@given(counts_and_target(), st.integers(2, 50))
def test_all_but_the_measure_corrected_for_n_ignore_the_scale_of_counts(case, scale):
    counts, target = case
    for name in MEASURES.keys() - {"unbiased_squared_l2"}:
        np.testing.assert_allclose(MEASURES[name](counts * scale, target), MEASURES[name](counts, target), atol=1e-12)


@given(COUNTS)
def test_an_empty_group_more_raises_l2_and_hides_from_the_papers_code(counts):
    more = np.append(counts, 0)
    groups = len(counts)
    risen = l2_discrepancy(more, uniform(groups + 1)) ** 2 - l2_discrepancy(counts, uniform(groups)) ** 2
    assert risen == pytest.approx(1 / groups - 1 / (groups + 1), abs=1e-12)
    assert paper_code_discrepancy(more, uniform(groups + 1)) == pytest.approx(
        float(paper_code_discrepancy(counts, uniform(groups))), abs=1e-12
    )


@given(counts_and_target())
def test_merging_groups_never_raises_total_variation(case):
    counts, target = case
    merged = np.append(counts[2:], counts[:2].sum()), np.append(target[2:], target[:2].sum())
    assert total_variation(*merged) <= total_variation(counts, target) + 1e-12


def test_values_by_hand():
    half = np.array([10, 10, 0, 0, 0, 0])
    assert l2_discrepancy(half, uniform(6)) == pytest.approx(np.sqrt(1 / 3))
    assert total_variation(half, uniform(6)) == pytest.approx(2 / 3)
    assert kl_divergence(half, uniform(6)) == pytest.approx(np.log(3))
    assert normalized_entropy(half, uniform(6)) == pytest.approx(np.log(2) / np.log(6))
    assert unbiased_squared_l2(half, uniform(6)) == pytest.approx(1 / 3 - 0.5 / 19)
    assert paper_code_discrepancy(half, uniform(6)) == 0
    assert paper_code_discrepancy(np.array([3, 1, 0]), uniform(3)) == pytest.approx(np.sqrt(2) / 4)
    assert worst_group_share(np.array([6, 3, 0]), np.array([0.5, 0.5, 0])) == pytest.approx(1 / 3)
    assert kl_divergence(np.array([1, 1]), np.array([1.0, 0.0])) == np.inf
    skewed = np.array([6, 3, 1])
    assert worst_group_ratio(skewed, np.array([0.5, 0.5, 0])) == pytest.approx(0.6)
    assert worst_group_ratio(skewed, uniform(3)) == pytest.approx(0.3)
    assert demographic_parity_difference(skewed, uniform(3)) == pytest.approx(0.5)
    assert demographic_parity_ratio(skewed, uniform(3)) == pytest.approx(1 / 6)
    assert demographic_parity_ratio(skewed, np.array([0.5, 0.5, 0])) == pytest.approx(0.5)
    assert demographic_parity_difference(skewed, np.array([0.2, 0.3, 0.5])) == pytest.approx(0.8)


@given(counts_and_target())
def test_jensen_shannon_is_scipys(case):
    counts, target = case
    with np.errstate(invalid="ignore"):  # the root of -1e-17
        expected = np.nan_to_num(jensenshannon(counts, target, base=2))
    assert jensen_shannon_distance(counts, target) == pytest.approx(expected, abs=1e-7)


@given(counts_and_target(), counts_and_target())
def test_a_target_for_each_population_is_each_with_its_own(first, second):
    groups = min(len(first[0]), len(second[0]))
    counts = np.stack([case[0][:groups] for case in (first, second)])
    targets = np.stack([case[1][:groups] / case[1][:groups].sum() for case in (first, second)])
    for measure in MEASURES.values():
        alone = [measure(*case) for case in zip(counts, targets, strict=True)]
        np.testing.assert_allclose(measure(counts, targets), alone, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_nothing_counted_is_not_a_number_and_leading_axes_stay(measure):
    counts = np.array([[[0, 0, 0], [5, 1, 2]], [[3, 3, 3], [0, 0, 9]]])
    values = measure(counts, uniform(3))
    assert values.shape == (2, 2)
    np.testing.assert_array_equal(np.isnan(values), [[True, False], [False, False]])
    assert values[0, 1] == pytest.approx(float(measure(counts[0, 1], uniform(3))))


def test_unbiased_needs_two_samples():
    assert np.isnan(unbiased_squared_l2(np.array([1, 0]), uniform(2)))


@pytest.mark.parametrize(("n", "groups"), [(20, 2), (48, 5), (100, 6)])
def test_floor_is_the_root_mean_square_of_an_even_population(n, groups):
    # Relative standard error of the mean square is sqrt(2 / (groups - 1) / 40000) <= 0.7%, of its root half of that;
    # 1.5% is over four of them: a false alarm in 1 of 25,000 seeds.
    drawn = np.random.default_rng(5).multinomial(n, uniform(groups), size=40_000)
    measured = np.sqrt(np.mean(np.square(l2_discrepancy(drawn, uniform(groups)))))
    assert measured / sampling_floor(n, groups) == pytest.approx(1, abs=0.015)


def test_floor_of_the_paper_and_of_nothing():
    assert sampling_floor(100, 6) == pytest.approx(0.0913, abs=5e-5)
    np.testing.assert_array_equal(np.isnan(sampling_floor(np.array([0, 4]), 2)), [True, False])


@pytest.mark.parametrize("n", [2, 5, 48])
def test_squared_l2_without_sampling_has_the_mean_of_the_population(n):
    population = np.array([0.6, 0.3, 0.1])
    drawn = np.random.default_rng(11).multinomial(n, population, size=40_000)
    values = unbiased_squared_l2(drawn, uniform(3))
    error = values.std() / np.sqrt(len(values))
    # Four standard errors either way: a false alarm in 1 of 16,000 seeds.
    assert abs(values.mean() - np.square(population - 1 / 3).sum()) < 4 * error
