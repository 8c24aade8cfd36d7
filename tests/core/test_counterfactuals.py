from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.attributes import AXES
from popalign_core.counterfactuals import Counterfactual, pair_counterfactuals, plan_counterfactuals
from popalign_core.expansion import expand_prompts
from popalign_core.population_counts import LabelledSample, PopulationPlan
from popalign_core.populations import PopulationPair, Refusal, RefusalReason
from popalign_core.preferences import PairWeighting
from popalign_core.subjects import Subject

AXES_USED = (AXES["perceived_gender"], AXES["perceived_skin_tone"])
NEUTRAL = expand_prompts([Subject("firefighter", "occupations", "train")], AXES_USED)[0]
PLAN = PopulationPlan(AXES_USED, 1, 0, PairWeighting.EVEN)
groups = st.tuples(*(st.sampled_from([*map(str, axis.groups), None]) for axis in AXES_USED))


def samples_of(cells: list[tuple[str | None, ...]], model: str = "base") -> list[LabelledSample]:
    return [
        LabelledSample(f"{model}/{NEUTRAL.prompt_id}/{index}", NEUTRAL.prompt_id, index, cell)
        for index, cell in enumerate(cells)
    ]


def planned_for(own: list[LabelledSample], plan: PopulationPlan = PLAN) -> list[Counterfactual]:
    return plan_counterfactuals(NEUTRAL.prompt_id, own, plan, seed=3)


def obeyed(planned: list[Counterfactual]) -> dict[str, LabelledSample]:
    return {c.sample_id: LabelledSample(f"again/{c.index}", "specific", c.index, c.cell) for c in planned}


@given(cells=st.lists(groups, max_size=24))
def test_the_changed_population_is_as_even_as_whole_numbers_allow_with_the_fewest_changes(
    cells: list[tuple[str | None, ...]],
) -> None:
    own = samples_of(cells)
    planned = planned_for(own)
    changed = {change.sample_id: change.cell for change in planned}
    known = [sample for sample in own if None not in sample.cell]
    assert changed.keys() <= {sample.sample_id for sample in known}
    after = [changed.get(sample.sample_id, sample.cell) for sample in known]
    for position, axis in enumerate(AXES_USED):
        counts = Counter(cell[position] for cell in after)
        sizes = [counts[str(group)] for group in axis.groups]
        assert max(sizes) - min(sizes) <= 1
        before = Counter(sample.cell[position] for sample in known)
        moved = sum(sample.cell[position] != cell[position] for sample, cell in zip(known, after, strict=True))
        assert moved == sum(max(0, before[str(group)] - counts[str(group)]) for group in axis.groups)


@given(cells=st.lists(groups, max_size=12))
def test_the_plan_does_not_depend_on_order(cells: list[tuple[str | None, ...]]) -> None:
    own = samples_of(cells)
    shuffled = [own[place] for place in np.random.default_rng(0).permutation(len(own))]
    assert planned_for(shuffled) == planned_for(own)


def test_an_even_population_changes_nothing_and_is_refused() -> None:
    own = samples_of([(str(g), str(t)) for g in AXES_USED[0].groups for t in AXES_USED[1].groups])
    outcome = pair_counterfactuals(NEUTRAL, own, planned_for(own), {}, PLAN)
    assert isinstance(outcome, Refusal)
    assert outcome.reason is RefusalReason.ALREADY_AT_TARGET


def test_pairs_are_the_changed_images_against_the_ones_they_were() -> None:
    own = samples_of([("man", "light")] * 10)
    planned = planned_for(own)
    outcome = pair_counterfactuals(NEUTRAL, own, planned, obeyed(planned), PLAN)
    assert isinstance(outcome, PopulationPair)
    assert [on.counts for on in outcome.preferred.counts[:2]] == [(5, 5), (2, 2, 2, 2, 2)]
    index_of = {sample.sample_id: sample.index for sample in own}
    assert {pair.winner_sample_id: index_of[pair.loser_sample_id] for pair in outcome.preferences} == {
        f"again/{change.index}": change.index for change in planned
    }


def test_an_image_that_is_not_perceived_as_asked_stays_out_on_both_sides() -> None:
    own = samples_of([("man", "light")] * 10)
    planned = planned_for(own)
    drawn = obeyed(planned)
    failed = planned[0].sample_id
    drawn[failed] = LabelledSample("again/failed", "specific", 0, ("man", None))
    outcome = pair_counterfactuals(NEUTRAL, own, planned, drawn, PLAN)
    assert isinstance(outcome, PopulationPair)
    assert failed in {sample.sample_id for sample in outcome.preferred.samples}
    assert failed not in {pair.loser_sample_id for pair in outcome.preferences}
    assert sum(one.unknown for one in outcome.yields) == 1
    assert sum(one.drawn - one.kept for one in outcome.yields) == 1


def test_nothing_perceived_as_asked_is_refused() -> None:
    own = samples_of([("man", "light")] * 10)
    planned = planned_for(own)
    drawn = {c.sample_id: LabelledSample("again", "specific", c.index, ("man", "light")) for c in planned}
    outcome = pair_counterfactuals(NEUTRAL, own, planned, drawn, PLAN)
    assert isinstance(outcome, Refusal)
    assert outcome.reason is RefusalReason.TOO_FEW_WINNERS


def test_changes_go_on_past_the_even_population_to_a_target_beyond_it() -> None:
    target = np.outer([0.3, 0.7], AXES_USED[1].uniform()).ravel()
    plan = replace(PLAN, target=target)
    own = samples_of([("man", str(tone)) for tone in AXES_USED[1].groups] * 2)
    planned = planned_for(own, plan)
    assert Counter(change.cell[0] for change in planned) == {"woman": 7}
    outcome = pair_counterfactuals(NEUTRAL, own, planned, obeyed(planned), plan)
    assert isinstance(outcome, PopulationPair)
    assert outcome.preferred.counts[0].counts == (3, 7)
    rows = {(row["side"], row["group"]): row for row in outcome.count_rows() if row["axis"] == "perceived_gender"}
    assert [rows["dispreferred", group]["target"] for group in ("man", "woman")] == [0.3, 0.7]
