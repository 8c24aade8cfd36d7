import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.preferences import (
    PairWeighting,
    excess_discrepancy,
    match_losers,
    pair_weights,
)

UNKNOWN = -1


def column(*groups: int) -> np.ndarray:
    return np.array(groups)[:, None]


def test_contrast_by_hand() -> None:
    # Shares .6 .3 .1 of three groups against a third each.
    gap = 1 / 3 - np.array([0.6, 0.3, 0.1])
    winners, losers = column(2, 1, 2, 0, 0, 2), column(0, 0, 1, 2, 0, UNKNOWN)
    weights = pair_weights(winners, losers, [gap], PairWeighting.CONTRAST)
    raw = np.array([0.5, 0.3, 0.2, 0, 0, 1 / 3 - 0.1])
    assert weights == pytest.approx(raw / raw[raw > 0].mean(), abs=1e-12)
    assert weights[0] > weights[1] > weights[2] > 0


def test_gaps_of_the_axes_add_up() -> None:
    gaps = [np.array([-0.4, 0.4]), np.array([0.1, -0.1])]
    winners, losers = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[0, 1], [0, 0], [0, 1]])
    weights = pair_weights(winners, losers, gaps, PairWeighting.CONTRAST)
    raw = np.array([1.0, 0.6, 0.2])
    assert weights == pytest.approx(raw / raw.mean(), abs=1e-12)


def test_even_weights_are_one() -> None:
    weights = pair_weights(column(0, 0), column(0, 1), [np.array([0.1, -0.1])], PairWeighting.EVEN, 0.2)
    assert weights.tolist() == [1.0, 1.0]


def test_a_population_at_its_target_has_no_weights() -> None:
    for weighting in (PairWeighting.CONTRAST, PairWeighting.DISCREPANCY):
        assert not pair_weights(column(0, 1), column(1, 0), [np.zeros(2)], weighting).any()


@st.composite
def weighted(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    pairs, sizes = draw(st.integers(1, 30)), draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    winners = np.stack([rng.integers(0, size, pairs) for size in sizes], axis=1)
    losers = np.stack([rng.integers(UNKNOWN, size, pairs) for size in sizes], axis=1)
    return winners, losers, [1 / size - rng.dirichlet(np.ones(size)) for size in sizes]


@given(weighted(), st.floats(0, 1))
def test_weights_in_general(case: tuple[np.ndarray, np.ndarray, list[np.ndarray]], discrepancy: float) -> None:
    winners, losers, gaps = case
    contrast = pair_weights(winners, losers, gaps, PairWeighting.CONTRAST)
    assert (contrast >= 0).all()
    assert not contrast[(winners == losers).all(axis=1)].any()
    if contrast.any():
        assert contrast[contrast > 0].mean() == pytest.approx(1, abs=1e-9)
    scaled = pair_weights(winners, losers, gaps, PairWeighting.DISCREPANCY, discrepancy)
    assert scaled == pytest.approx(contrast * discrepancy)
    # Not scaled prompt by prompt: a fixed share of the sum of gaps, whatever the other pairs are.
    raw = pair_weights(winners, losers, gaps, PairWeighting.AXIS)
    assert ((raw > 0) == (contrast > 0)).all()
    halved = pair_weights(winners, losers, [gap / 2 for gap in gaps], PairWeighting.AXIS)
    assert halved == pytest.approx(raw / 2, abs=1e-9)
    # Of a pair and its reverse at most one counts.
    known = (losers >= 0).all(axis=1)
    reverse = pair_weights(losers[known], winners[known], gaps, PairWeighting.CONTRAST)
    assert not (contrast[known] * reverse).any()


@given(weighted(), st.integers(0, 99))
def test_weights_depend_on_no_order_of_pairs(case: tuple[np.ndarray, np.ndarray, list[np.ndarray]], seed: int) -> None:
    winners, losers, gaps = case
    order = np.random.default_rng(seed).permutation(len(winners))
    straight = pair_weights(winners, losers, gaps, PairWeighting.CONTRAST)
    assert pair_weights(winners[order], losers[order], gaps, PairWeighting.CONTRAST) == pytest.approx(straight[order])


def test_a_hundred_thousand_pairs_are_weighted_at_once() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 10, (2, 100_000, 3))
    gaps = [0.1 - rng.dirichlet(np.ones(10)) for _ in range(3)]
    weights = pair_weights(*cells, gaps, PairWeighting.CONTRAST)
    assert weights.shape == (100_000,)
    assert 0.3 < (weights > 0).mean() < 0.7


@given(counts=st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(any))
def test_excess_discrepancy_lies_between_even_and_collapsed(counts: list[int]) -> None:
    excess = excess_discrepancy(np.array(counts), np.full(len(counts), 1 / len(counts)))
    assert 0 <= excess <= 1
    collapsed = np.array([sum(counts) + 1, *[0] * (len(counts) - 1)])
    assert excess_discrepancy(collapsed, np.full(len(counts), 1 / len(counts))) == pytest.approx(1, abs=1e-12)


def test_excess_discrepancy_of_few_samples() -> None:
    assert excess_discrepancy(np.array([1, 0]), np.array([0.5, 0.5])) == 0
    assert excess_discrepancy(np.array([0, 0]), np.array([0.5, 0.5])) == 0
    assert excess_discrepancy(np.array([3]), np.array([1.0])) == 0


def test_the_squared_excess_is_unbiased_before_its_cut() -> None:
    # 4,000 populations of 20 with true shares .7 .3: squared L2 0.08 of at most 0.5. Each has a standard deviation of
    # about 0.16 of the part, so their mean one of 0.0025; four of those either way.
    rng = np.random.default_rng(0)
    counts = rng.binomial(20, 0.7, 4000)
    parts = [excess_discrepancy(np.array([one, 20 - one]), np.array([0.5, 0.5])) ** 2 for one in counts]
    uncut = [2 * ((one / 20 - 0.5) ** 2 * 2 - (1 - (one / 20) ** 2 - (1 - one / 20) ** 2) / 19) for one in counts]
    assert parts == pytest.approx(np.maximum(uncut, 0), abs=1e-12)
    assert np.mean(uncut) == pytest.approx(0.16, abs=0.01)


@given(
    winners=st.lists(st.integers(0, 30), max_size=20),
    more=st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_losers_are_matched_one_to_one(winners: list[int], more: int, seed: int) -> None:
    own = list(range(5, 5 + len(winners) + more))
    matched = match_losers(winners, own, np.random.default_rng(seed))
    assert len(matched) == len(winners) == len(set(matched))
    assert set(matched) <= set(range(len(own)))
    met = [own[position] == index for position, index in zip(matched, winners, strict=True)]
    assert sum(met) >= len(set(winners) & set(own))


def test_excess_discrepancy_of_many_populations_averages_squares_before_the_root() -> None:
    target = np.array([0.5, 0.5])
    # 6 of 8: L2^2 = 2 / 16 = 0.125, bias (1 - 40/64) / 7; 4 of 8: 0, bias (1 - 32/64) / 7; farthest 1/2.
    expected = math.sqrt((0.125 - (24 / 64 + 32 / 64) / 7) / 2 / 0.5)
    assert excess_discrepancy(np.array([[6, 2], [4, 4], [1, 0]]), target) == pytest.approx(expected)
    # Chance alone leaves nothing: of a thousand even populations of 12 the mean excess is small.
    counts = np.random.default_rng(0).binomial(12, 0.5, 1000)
    assert excess_discrepancy(np.stack([counts, 12 - counts], axis=1), target) < 0.1
