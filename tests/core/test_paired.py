"""Paired comparisons against closed forms, scipy, and populations whose truth is known."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from popalign_core.assessment.paired import (
    DISPARITY,
    SHARE,
    UNKNOWN,
    PairedRow,
    compare_axis,
    difference_interval,
    holm,
    joint_counts,
    mcnemar_exact,
)
from popalign_core.assessment.sampler_verdict import Movement, judge_sampler
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput

GENDER, TONE = AXES["perceived_gender"], AXES["perceived_skin_tone"]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def gender_table(*prompts: tuple[int, int, int, int], unknown: int = 0) -> np.ndarray:
    """man-man, man-woman, woman-man, woman-woman of each prompt; unknown: pairs that only the fast side cannot read."""
    table = np.zeros((len(prompts), 3, 3), dtype=np.int64)
    for row, (mm, mw, wm, ww) in enumerate(prompts):
        table[row, :2, :2] = [[mm, mw], [wm, ww]]
        table[row, 0, 2] = unknown
    return table


def rows_of(table: np.ndarray, resamples: int = 400) -> dict[tuple[str, str | None], PairedRow]:
    found = compare_axis(table, GENDER if table.shape[-1] == 3 else TONE, rng=rng(), resamples=resamples)
    return {(row.measure, row.group): row for row in found}


def test_a_table_worked_out_by_hand() -> None:
    rows = rows_of(gender_table((30, 10, 2, 18), (5, 0, 3, 12), unknown=2))
    man = rows[SHARE, "man"]
    assert (man.n, man.unknown, man.lost, man.gained) == (80, 4, 10, 5)
    assert (man.exact, man.fast) == (45 / 80, 40 / 80)
    assert man.difference == pytest.approx(-5 / 80)
    assert man.flip_rate == pytest.approx(15 / 80)
    assert man.p_value == pytest.approx(2 * sum(comb(15, k) for k in range(6)) / 2**15)
    assert man.floor == pytest.approx(sqrt(2 * (60 * (40 / 60) * (20 / 60) + 20 * (5 / 20) * (15 / 20))) / 80)
    woman = rows[SHARE, "woman"]
    assert (woman.difference, woman.p_value) == (pytest.approx(-man.difference), man.p_value)
    unknown = rows[UNKNOWN, None]
    assert (unknown.n, unknown.unknown, unknown.lost, unknown.gained) == (84, 0, 0, 4)
    assert (unknown.exact, unknown.fast) == (0, 4 / 84)
    disparity = rows[DISPARITY, None]
    # sqrt(2) |share of men - 1/2| of each prompt; the two unknown ones are men to the exact sampler.
    assert disparity.exact == pytest.approx(sqrt(2) * np.mean([42 / 62 - 0.5, 0.5 - 7 / 22]))
    assert disparity.fast == pytest.approx(sqrt(2) * np.mean([32 / 60 - 0.5, 0.5 - 8 / 20]))
    assert disparity.floor == pytest.approx(np.mean([sqrt(0.5 / 62), sqrt(0.5 / 22)]))
    assert disparity.flip_rate == pytest.approx(15 / 80)


@given(lost=st.integers(0, 60), gained=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_pairs_that_changed(lost: int, gained: int) -> None:
    p = mcnemar_exact(lost, gained)
    assert p == mcnemar_exact(gained, lost)
    if lost + gained:
        tail = sum(comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
        assert p == pytest.approx(min(1.0, 2 * tail))
        assert p == pytest.approx(binomtest(lost, lost + gained).pvalue)
    else:
        assert p == 1


@given(lost=st.integers(0, 40), gained=st.integers(0, 40), stay=st.integers(1, 400))
def test_the_interval_of_a_difference_holds_it_and_turns_round_with_it(lost: int, gained: int, stay: int) -> None:
    n = lost + gained + stay
    low, high = difference_interval(lost, gained, n)
    assert low <= (gained - lost) / n <= high
    assert low < 0 or lost < gained
    assert difference_interval(gained, lost, n) == pytest.approx((-high, -low))


def test_no_flip_is_not_certainty() -> None:
    man = rows_of(gender_table((20, 0, 0, 20)))[SHARE, "man"]
    half = 1.959964 * sqrt(2 / 42 / 42)  # one pair added to each side that changes
    assert (man.difference_low, man.difference_high) == (pytest.approx(-half), pytest.approx(half))
    assert man.flip_high == pytest.approx(1.959964**2 / (40 + 1.959964**2))  # Wilson's at 0


def test_the_bootstrap_has_the_textbook_width_where_prompts_are_alike() -> None:
    """Multinomial: var of (gained - lost) / n is (a + b - (b - a)^2) / n."""
    table = gender_table(*[(200, 40, 20, 140)] * 40)
    man = rows_of(table, resamples=2000)[SHARE, "man"]
    a, b, n = 0.1, 0.05, 16_000
    textbook = 1.96 * sqrt((a + b - (b - a) ** 2) / n)
    half = (man.difference_high - man.difference_low) / 2
    assert textbook * 0.93 < half < textbook * 1.07


@pytest.mark.parametrize("flips", range(1, 7))
def test_a_flip_rate_is_a_share_to_the_end_of_its_interval(flips: int) -> None:
    """All flips in one prompt: the lowest resamples have none, and are moved by the mean of all."""
    for row in rows_of(gender_table((20, flips, 0, 2), *[(12, 0, 0, 12)] * 14)).values():
        assert 0 <= row.flip_low <= row.flip_rate <= row.flip_high <= 1


def test_prompts_that_differ_widen_the_interval() -> None:
    alike = rows_of(gender_table(*[(10, 10, 10, 10)] * 20))[SHARE, "man"]
    opposed = rows_of(gender_table(*[(10, 20, 0, 10), (10, 0, 20, 10)] * 10))[SHARE, "man"]
    assert opposed.difference == alike.difference == 0
    assert opposed.difference_high > 2 * alike.difference_high


@pytest.mark.parametrize(("shift", "limits"), [(0.0, (0.90, 1.0)), (0.2, (0.90, 1.0))])
def test_intervals_cover_the_truth(shift: float, limits: tuple[float, float]) -> None:
    """60 draws of 15 prompts with shares of their own, 24 pairs each: 95% within what 60 draws can tell."""
    truth, covered = rng(), 0
    for _ in range(60):
        shares = truth.beta(4, 2, size=15)
        cells = np.stack([shares * (0.9 - shift), shares * (0.1 + shift), (1 - shares) * 0.1, (1 - shares) * 0.9], -1)
        man = rows_of(gender_table(*(tuple(truth.multinomial(24, cell)) for cell in cells)), 300)[SHARE, "man"]
        mean = 4 / 6
        true_change = (1 - mean) * 0.1 - mean * (0.1 + shift)
        covered += man.difference_low <= true_change <= man.difference_high
    assert limits[0] <= covered / 60 <= limits[1]


def test_the_same_in_any_order_of_the_prompts() -> None:
    exact = {"b": ["man", None, "woman"], "a": ["man", "man", "woman"]}
    fast = {"a": ["man", "woman", "woman"], "b": ["man", "man", None]}
    table = joint_counts(exact, fast, GENDER)
    assert table.tolist() == [[[1, 1, 0], [0, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 1], [1, 0, 0]]]
    np.testing.assert_array_equal(joint_counts(dict(reversed(exact.items())), fast, GENDER), table)


@pytest.mark.parametrize("fast", [{"a": ["man"]}, {"b": ["man", "man"]}])
def test_what_is_not_paired_is_refused(fast: dict[str, list[str | None]]) -> None:
    with pytest.raises(InvalidInput, match="not pairs"):
        joint_counts({"a": ["man", "man"]}, fast, GENDER)


def test_more_groups_than_a_block_holds_resamples() -> None:
    table = np.zeros((2, 6, 6), dtype=np.int64)
    table[:, np.arange(6), np.arange(6)] = 3
    table[0, 0, 1] = 6
    rows = rows_of(table, resamples=600)
    assert len(rows) == 7
    assert rows[SHARE, "light"].lost == rows[SHARE, "medium-light"].gained == 6
    assert rows[SHARE, "dark"].p_value == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, float("nan")])[:3] == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def verdict(table: np.ndarray, margin: float = 0.05) -> Movement:
    return judge_sampler({"judge": compare_axis(table, GENDER, rng=rng(), resamples=400)}, margin).movement


def test_a_sampler_that_moves_many_is_found_out() -> None:
    assert verdict(gender_table(*[(20, 8, 0, 12)] * 15)) is Movement.MOVED


def test_equivalence_needs_the_whole_interval_inside_the_margin() -> None:
    few, many = gender_table(*[(10, 1, 1, 8)] * 4), gender_table(*[(500, 5, 5, 490)] * 15)
    assert verdict(few) is Movement.OPEN  # no significant difference, and nothing shown
    assert verdict(many) is Movement.WITHIN
    assert verdict(few, margin=0.9) is Movement.WITHIN


def test_a_change_smaller_than_the_margin_is_within() -> None:
    table = gender_table(*[(500, 12, 0, 488)] * 15)
    man = rows_of(table)[SHARE, "man"]
    assert man.difference_high < 0
    assert man.p_value < 1e-6
    assert verdict(table) is Movement.WITHIN
    assert verdict(table, margin=0.01) is Movement.MOVED


def test_people_who_can_no_longer_be_read_are_a_movement() -> None:
    found = judge_sampler({"judge": compare_axis(gender_table(*[(10, 0, 0, 10)] * 10, unknown=10), GENDER, rng=rng())})
    assert found.movement is Movement.MOVED
    assert "unknown images (perceived gender) 0.000 to 0.333" in found.reason


def test_chance_alone_is_seldom_a_movement() -> None:
    """100 samplers that change a tenth of the images at random: a false alarm of 5% is at most 11 of them (p = .01)."""
    truth = rng()
    tables = [gender_table(*truth.multinomial(24, [0.45, 0.05, 0.05, 0.45], size=12).tolist()) for _ in range(100)]
    alarms = sum(
        judge_sampler({"judge": compare_axis(table, GENDER, rng=rng(), resamples=200)}, 0.01).movement is Movement.MOVED
        for table in tables
    )
    assert alarms <= 11


@pytest.mark.parametrize("margin", [0, -0.1, 1, float("nan")])
def test_a_margin_that_is_none_is_refused(margin: float) -> None:
    with pytest.raises(InvalidInput, match="margin"):
        judge_sampler({"judge": []}, margin)


def test_nothing_known_is_open_and_not_within() -> None:
    table = np.zeros((3, 3, 3), dtype=np.int64)
    table[:, 2, 2] = 5
    found = judge_sampler({"judge": compare_axis(table, GENDER, rng=rng(), resamples=50)})
    assert found.movement is Movement.OPEN
