import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.alignment.stopping import HeldOutPoint, StopRule
from popalign_core.errors import InvalidInput


def history_of(*values: float) -> list[HeldOutPoint]:
    return [HeldOutPoint(10 * index, {"tone": value}) for index, value in enumerate(values)]


def test_the_best_point_is_kept_and_the_turn_is_told() -> None:
    rule = StopRule(patience=2)
    values = (0.6, 0.5, 0.3, 0.4, 0.5)
    verdicts = [rule.judge(history_of(*values[: count + 1])) for count in range(5)]
    assert [verdict.best for verdict in verdicts] == [0, 1, 2, 2, 2]
    assert [verdict.reason for verdict in verdicts] == [None, None, None, None, "turned"]


def test_a_gain_too_small_does_not_count() -> None:
    history = history_of(0.6, 0.599, 0.598)
    assert StopRule(patience=2, min_gain=0.01).judge(history).reason == "turned"
    assert StopRule(patience=2).judge(history).reason is None


def test_training_stops_when_every_axis_is_at_its_floor() -> None:
    rule = StopRule(floors={"tone": 0.2, "gender": 0.15})
    points = [HeldOutPoint(0, {"tone": 0.6, "gender": 0.5}), HeldOutPoint(10, {"tone": 0.19, "gender": 0.3})]
    assert rule.judge(points).reason is None
    points.append(HeldOutPoint(20, {"tone": 0.2, "gender": 0.1}))
    verdict = rule.judge(points)
    assert (verdict.best, verdict.reason) == (2, "arrived")


def test_below_the_floor_nothing_is_better() -> None:
    rule = StopRule(floors={"tone": 0.2})
    assert rule.score({"tone": 0.6}, {"tone": 0.05}) == rule.score({"tone": 0.6}, {"tone": 0.2})


def test_axes_weigh_alike_whatever_their_size() -> None:
    rule = StopRule()
    before = {"gender": 0.4, "tone": 0.8}
    assert rule.score(before, {"gender": 0.2, "tone": 0.8}) == pytest.approx(0.75)
    assert rule.score(before, {"gender": 0.4, "tone": 0.4}) == pytest.approx(0.75)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.integers(1, 4))
def test_the_verdict_is_one_of_the_points_seen_and_none_is_better(values: list[float], patience: int) -> None:
    verdict = StopRule(patience=patience).judge(history_of(*values))
    assert values[verdict.best] == min(values) or values[verdict.best] <= 1e-6
    if verdict.reason == "turned":
        assert len(values) - 1 - verdict.best >= patience


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InvalidInput, match="before training"):
        StopRule().judge([])
    with pytest.raises(InvalidInput, match="cannot be compared"):
        StopRule().judge([HeldOutPoint(0, {"tone": 0.5}), HeldOutPoint(1, {"gender": 0.5})])
    with pytest.raises(InvalidInput, match="not a number"):
        StopRule().judge([HeldOutPoint(0, {"tone": math.nan})])


def test_a_point_that_lost_its_quality_is_not_kept_however_even() -> None:
    history = [
        HeldOutPoint(0, {"tone": 0.6}, 50.0),
        HeldOutPoint(1, {"tone": 0.4}, 49.2),
        HeldOutPoint(2, {"tone": 0.1}, 48.9),
    ]
    assert StopRule().judge(history).best == 2
    rule = StopRule(patience=1, max_quality_drop=0.02)
    assert rule.judge(history).best == 1
    assert rule.judge(history).reason == "turned"
    with pytest.raises(InvalidInput, match="quality of every point"):
        rule.judge(history_of(0.6, 0.5))
