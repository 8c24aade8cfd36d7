import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.attributes import AXES
from popalign_core.overshoot import aimed_target, kept_lean, plan_past_target, plan_prompts, prompt_shares
from popalign_core.population_counts import LabelledSample, PopulationPlan
from popalign_core.preferences import PairWeighting

GENDER, TONE = AXES["perceived_gender"], AXES["perceived_skin_tone"]
EVEN = GENDER.uniform()


def images(prompt: str, men: int, women: int) -> list[LabelledSample]:
    cells = [("man",)] * men + [("woman",)] * women
    return [LabelledSample(f"base/{prompt}/{index}", prompt, index, cell) for index, cell in enumerate(cells)]


def test_shares_are_drawn_towards_the_target_and_leave_unknown_images_out() -> None:
    unknown = LabelledSample("base/a/9", "a", 9, (None,))
    shares = prompt_shares([[*images("a", 8, 0), unknown], []], 0, GENDER)
    assert shares == pytest.approx(np.array([[0.9, 0.1], [0.5, 0.5]]))


def test_what_is_kept_is_a_slope_in_which_large_leans_count_most() -> None:
    before = np.array([[1.0, 0.0], [0.4, 0.6]])
    assert kept_lean(before, before, EVEN) == pytest.approx(1)
    assert kept_lean(before, np.array([[0.75, 0.25], [0.45, 0.55]]), EVEN) == pytest.approx(0.5)
    assert kept_lean(before, 1 - before, EVEN) == 0, "a lean that turned round is not kept"
    # (.5 * .5 + .1 * 0) / (.25 + .01), by hand for the share of men.
    assert kept_lean(before, np.array([[1.0, 0.0], [0.5, 0.5]]), EVEN) == pytest.approx(0.25 / 0.26)
    assert kept_lean(np.tile(EVEN, (2, 1)), before, EVEN) == 0


@given(
    counts=st.lists(st.integers(0, 30), min_size=5, max_size=5).filter(any),
    past=st.floats(0, 5),
)
def test_an_aim_is_a_distribution_on_the_other_side_of_the_target(counts: list[int], past: float) -> None:
    before = np.array(counts) / sum(counts)
    aim = aimed_target(TONE.uniform(), before, past)
    assert aim.sum() == pytest.approx(1)
    assert (aim > 0).all()
    assert (np.diff(aim[np.argsort(before)]) <= 1e-12).all(), "the more of a group there was, the less is aimed at"


def test_no_overshoot_is_the_target_itself() -> None:
    assert aimed_target(EVEN, np.array([0.9, 0.1]), 0).tolist() == [0.5, 0.5]
    assert aimed_target(EVEN, np.array([0.9, 0.1]), 0.5) == pytest.approx(np.array([0.3, 0.7]))
    assert aimed_target(EVEN, np.array([1.0, 0.0]), 3) == pytest.approx(np.array([0.02, 2.0]) / 2.02)


def test_each_prompt_is_aimed_against_its_own_lean() -> None:
    plan = PopulationPlan((GENDER,), 1, 0, PairWeighting.AXIS)
    own = {"men": images("men", 10, 0), "women": images("women", 0, 10)}
    before, now = {"v": images("v", 9, 0)}, {"v": images("v", 9, 0)}
    plans = plan_past_target(plan, own, own, (before, now), past={GENDER.name: 0.6})
    aims = {prompt: each.targets()[0] for prompt, each in plans.items()}
    assert aims["men"] == pytest.approx(np.array([0.25, 0.75]))
    assert aims["women"] == pytest.approx(np.array([0.75, 0.25]))
    others = plan_past_target(plan, own, own, (before, now), past={TONE.name: 0.6})
    assert others["men"].targets()[0].tolist() == [0.5, 0.5], "another axis overshoots"
    # As far from its aim as a population can be: all that there is to do is left.
    assert plans["men"].axis_scales == (pytest.approx(1),)


def test_without_the_weighting_by_axis_nothing_is_scaled() -> None:
    plan = PopulationPlan((GENDER,), 1, 0, PairWeighting.CONTRAST)
    assert plan_prompts(plan, {"men": images("men", 4, 0)}) == {"men": plan}
