import math
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.expansion import Prompt, expand_prompts
from popalign_core.population_counts import LabelledSample, PopulationPlan, axis_excess, group_counts
from popalign_core.populations import Cell, PopulationPair, Refusal, RefusalReason, allocate, build_populations
from popalign_core.preferences import PairWeighting
from popalign_core.subjects import Subject

GENDER, TONE = AXES["perceived_gender"], AXES["perceived_skin_tone"]
AXIS_SETS = ((GENDER,), (GENDER, TONE))
LIGHT_MAN, DARK_WOMAN = ("man", "light"), ("woman", "dark")


def family_of(*axes: Axis) -> tuple[Prompt, dict[Cell, Prompt]]:
    neutral, *specific = expand_prompts([Subject("firefighter", "occupations", "train")], axes)
    return neutral, {prompt.cell: prompt for prompt in specific}


FAMILIES = {axes: family_of(*axes) for axes in AXIS_SETS}


def samples_of(prompt: Prompt, cells: Sequence[tuple[str | None, ...]], first: int = 0) -> list[LabelledSample]:
    return [
        LabelledSample(f"base/{prompt.prompt_id}/{index}", prompt.prompt_id, index, cell)
        for index, cell in enumerate(cells, start=first)
    ]


def obedient(axes: tuple[Axis, ...], per_cell: int) -> dict[Cell, list[LabelledSample]]:
    """Samples that are all perceived as requested, each cell with indices of its own."""
    return {
        cell: samples_of(prompt, [cell] * per_cell, first=number * per_cell)
        for number, (cell, prompt) in enumerate(FAMILIES[axes][1].items())
    }


def plan_of(axes: tuple[Axis, ...], size: int, **changes: object) -> PopulationPlan:
    return replace(PopulationPlan(axes, size, 0, PairWeighting.CONTRAST), **changes)  # pyright: ignore[reportArgumentType]


def build(
    axes: tuple[Axis, ...],
    own: Sequence[tuple[str | None, ...]],
    specific: dict[Cell, list[LabelledSample]],
    plan: PopulationPlan,
) -> PopulationPair | Refusal:
    neutral, _ = FAMILIES[axes]
    return build_populations(neutral, samples_of(neutral, own), specific, plan)


def built(outcome: PopulationPair | Refusal) -> PopulationPair:
    assert isinstance(outcome, PopulationPair), outcome
    return outcome


def refused(outcome: PopulationPair | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal)
    return outcome


@st.composite
def cases(
    draw: st.DrawFn,
) -> tuple[tuple[Axis, ...], list[tuple[str | None, ...]], dict[Cell, list[LabelledSample]], PopulationPlan]:
    axes, size = draw(st.sampled_from(AXIS_SETS)), draw(st.integers(1, 30))
    # What is drawn is how skewed, obedient and many; who exactly comes from a generator, or most cases are too small.
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    cells: list[tuple[str | None, ...]] = [*product(*(axis.groups for axis in axes)), (None,) * len(axes)]
    shares = rng.dirichlet(np.full(len(cells), draw(st.sampled_from([0.1, 1.0, 100.0]))))
    own = [cells[cell] for cell in rng.choice(len(cells), size + draw(st.integers(-1, 9)), p=shares)]
    obedience = draw(st.sampled_from([1.0, 0.8]))
    specific: dict[Cell, list[LabelledSample]] = {}
    for cell, prompt in FAMILIES[axes][1].items():
        perceived = [cell if rng.random() < obedience else cells[rng.integers(len(cells))] for _ in range(4)]
        specific[cell] = samples_of(prompt, perceived, first=int(rng.integers(20)))
    weighting = draw(st.sampled_from(PairWeighting))
    return axes, own, specific, PopulationPlan(axes, size, draw(st.integers(0, 9)), weighting)


@given(cases())
def test_what_holds_for_every_pair_of_populations(case: tuple) -> None:  # pyright: ignore[reportMissingTypeArgument]
    axes, own, specific, plan = case
    outcome = build(axes, own, specific, plan)
    if isinstance(outcome, Refusal):
        return
    preferred, dispreferred = outcome.preferred, outcome.dispreferred
    assert len(preferred.samples) == len(dispreferred.samples) == outcome.size <= plan.size
    # The preferred side is balanced over all cells, of valid samples only, and the more even one.
    counts = preferred.counts[-1].counts
    assert max(counts) - min(counts) <= 1
    assert preferred.counts[-1].unknown == 0
    valid = {sample for cell, samples in specific.items() for sample in samples if sample.cell == cell}
    assert set(preferred.samples) <= valid
    assert preferred.counts[-1].discrepancy < dispreferred.counts[-1].discrepancy
    # One to one: nobody is in two pairs.
    winners = [pair.winner_sample_id for pair in outcome.pairs]
    losers = [pair.loser_sample_id for pair in outcome.pairs]
    assert [sample.sample_id for sample in preferred.samples] == winners
    assert [sample.sample_id for sample in dispreferred.samples] == losers
    assert len(set(winners)) == len(set(losers)) == len({pair.pair_id for pair in outcome.pairs}) == outcome.size
    neutral = FAMILIES[axes][0]
    assert {(pair.prompt_id, pair.caption) for pair in outcome.pairs} == {(neutral.prompt_id, neutral.text)}
    assert {pair.population_id for pair in outcome.pairs} == {outcome.population_id}
    assert outcome.preferences
    assert all(math.isfinite(pair.weight) and pair.weight >= 0 for pair in outcome.pairs)
    for side in (preferred, dispreferred):
        assert [sum(on.counts) + on.unknown for on in side.counts] == [outcome.size] * len(side.counts)


@given(cases(), st.randoms(use_true_random=False))
def test_the_outcome_depends_on_no_order(case: tuple, random) -> None:  # type: ignore[no-untyped-def]  # pyright: ignore
    axes, own, specific, plan = case
    neutral, _ = FAMILIES[axes]
    samples = samples_of(neutral, own)
    outcome = build_populations(neutral, samples, specific, plan)
    shuffled = random.sample(samples, len(samples))
    cells = random.sample(list(specific), len(specific))
    mixed = {cell: random.sample(specific[cell], len(specific[cell])) for cell in cells}
    assert repr(build_populations(neutral, shuffled, mixed, plan)) == repr(outcome)


def test_populations_survive_pickling() -> None:
    outcome = built(build((GENDER,), [("man",)] * 4, obedient((GENDER,), 2), plan_of((GENDER,), 4)))
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_a_collapsed_population_by_hand() -> None:
    axes = (GENDER, TONE)
    outcome = built(build(axes, [LIGHT_MAN] * 20, obedient(axes, 2), plan_of(axes, 20)))
    on_gender, on_tone, crossed = outcome.dispreferred.counts
    assert (on_gender.counts, on_tone.counts) == ((20, 0), (20, 0, 0, 0, 0))
    assert on_gender.discrepancy == pytest.approx(math.sqrt(1 / 2), abs=1e-12)
    assert on_tone.discrepancy == pytest.approx(math.sqrt(4 / 5), abs=1e-12)
    assert crossed.discrepancy == pytest.approx(math.sqrt(9 / 10), abs=1e-12)
    assert [on.counts for on in outcome.preferred.counts] == [(10, 10), (4,) * 5, (2,) * 10]
    assert [on.discrepancy for on in outcome.preferred.counts] == pytest.approx([0, 0, 0], abs=1e-12)
    # Two of the twenty winners are light men themselves and say nothing about the population.
    assert (len(outcome.pairs), len(outcome.preferences)) == (20, 18)
    assert np.mean([pair.weight for pair in outcome.preferences]) == pytest.approx(1, abs=1e-12)


def test_pairs_share_their_index_where_they_can() -> None:
    axes = (GENDER, TONE)
    outcome = built(build(axes, [LIGHT_MAN] * 20, obedient(axes, 2), plan_of(axes, 20)))
    indices = zip(outcome.preferred.samples, outcome.dispreferred.samples, strict=True)
    assert all(winner.index == loser.index for winner, loser in indices)
    # All cells with the indices 0 and 1: two winners can meet their own index, and everybody else somebody's.
    same = {cell: samples_of(prompt, [cell] * 2) for cell, prompt in FAMILIES[axes][1].items()}
    outcome = built(build(axes, [LIGHT_MAN] * 20, same, plan_of(axes, 20)))
    indices = zip(outcome.preferred.samples, outcome.dispreferred.samples, strict=True)
    assert sum(winner.index == loser.index for winner, loser in indices) == 2


def test_winners_are_chosen_among_many_for_their_index() -> None:
    specific = {cell: samples_of(prompt, [cell] * 8) for cell, prompt in FAMILIES[(GENDER,)][1].items()}
    outcome = built(build((GENDER,), [("man",)] * 8, specific, plan_of((GENDER,), 8)))
    indices = zip(outcome.preferred.samples, outcome.dispreferred.samples, strict=True)
    assert all(winner.index == loser.index for winner, loser in indices)


def test_samples_not_perceived_as_requested_are_discarded_and_counted() -> None:
    _, prompts = FAMILIES[(GENDER,)]
    man, woman = ("man",), ("woman",)
    specific = {
        man: samples_of(prompts[man], [man, man, woman, (None,)]),
        woman: samples_of(prompts[woman], [woman, woman, woman, woman]),
    }
    outcome = built(build((GENDER,), [man] * 6, specific, plan_of((GENDER,), 4)))
    of_men, of_women = outcome.yields
    assert (of_men.cell, of_men.drawn, of_men.kept, of_men.unknown) == (man, 4, 2, 1)
    assert (of_men.discard_rate, of_women.discard_rate) == (0.5, 0.0)
    assert outcome.preferred.counts[-1].counts == (2, 2)


def test_a_short_cell_makes_the_population_smaller_and_not_less_even() -> None:
    _, prompts = FAMILIES[(GENDER,)]
    specific = {cell: samples_of(prompt, [cell] * 9) for cell, prompt in prompts.items()}
    specific[("woman",)] = specific[("woman",)][:3]
    outcome = built(build((GENDER,), [("man",)] * 20, specific, plan_of((GENDER,), 20)))
    assert outcome.preferred.counts[-1].counts == (4, 3)
    assert outcome.dispreferred.counts[-1].counts == (7, 0)


def test_unknown_own_samples_stay_in_the_population_and_out_of_the_shares() -> None:
    own: list[tuple[str | None, ...]] = [("man",)] * 6 + [(None,)] * 2
    outcome = built(build((GENDER,), own, obedient((GENDER,), 4), plan_of((GENDER,), 8)))
    on = outcome.dispreferred.counts[-1]
    assert (on.counts, on.unknown) == ((6, 0), 2)
    assert on.discrepancy == pytest.approx(math.sqrt(1 / 2), abs=1e-12)


def test_a_cell_known_on_one_axis_counts_there() -> None:
    axes = (GENDER, TONE)
    own: list[tuple[str | None, ...]] = [LIGHT_MAN] * 18 + [("man", None), (None, "dark")]
    outcome = built(build(axes, own, obedient(axes, 2), plan_of(axes, 20)))
    assert [on.unknown for on in outcome.dispreferred.counts] == [1, 1, 2]
    assert outcome.dispreferred.counts[0].counts == (19, 0)
    assert outcome.dispreferred.counts[1].counts == (18, 0, 0, 0, 1)


def test_each_reason_of_refusal() -> None:
    axes, everybody = (GENDER,), obedient((GENDER,), 4)
    even, plan = [("man",), ("woman",)] * 4, plan_of((GENDER,), 8)
    tie = refused(build(axes, even, everybody, plan))
    assert (tie.reason, tie.prompt_id) == (RefusalReason.TIE, FAMILIES[axes][0].prompt_id)

    uneven = refused(build(axes, even, everybody, plan_of(axes, 8, target=np.array([0.5, 0.5]))))
    assert uneven.reason is RefusalReason.TIE
    # Five winners are 3 and 2, or 2 and 3: less even than the four known own samples.
    own: list[tuple[str | None, ...]] = [*even[:4], (None,)]
    worse = refused(build(axes, own, everybody, plan_of(axes, 5)))
    assert worse.reason is RefusalReason.PREFERRED_NOT_MORE_EVEN

    empty = refused(build(axes, [("man",)] * 8, {("man",): everybody[("man",)]}, plan))
    assert empty.reason is RefusalReason.TOO_FEW_WINNERS
    assert "woman" in empty.detail
    assert [one.drawn for one in empty.yields] == [4, 0]
    assert math.isnan(empty.yields[1].discard_rate)

    few = refused(build(axes, [("man",)] * 7, everybody, plan))
    assert few.reason is RefusalReason.TOO_FEW_OWN_SAMPLES
    unknown = refused(build(axes, [(None,)] * 8, everybody, plan))
    assert unknown.reason is RefusalReason.TOO_FEW_OWN_SAMPLES


def test_an_empty_crossed_cell_makes_the_population_smaller_and_an_empty_group_refuses_it() -> None:
    axes = (GENDER, TONE)
    specific = obedient(axes, 2)
    specific[DARK_WOMAN] = []
    outcome = built(build(axes, [LIGHT_MAN] * 12, specific, plan_of(axes, 10)))
    assert outcome.size == 9
    gender, tone, crossed = (on.counts for on in outcome.preferred.counts)
    assert sorted(gender) == [4, 5]
    assert sorted(tone) == [1, 2, 2, 2, 2]
    assert sorted(crossed) == [0] + [1] * 9
    specific[("man", "dark")] = []
    without = refused(build(axes, [LIGHT_MAN] * 12, specific, plan_of(axes, 10)))
    assert without.reason is RefusalReason.TOO_FEW_WINNERS
    assert without.detail.endswith(": dark")


def test_an_even_enough_population_is_refused_when_weights_follow_its_discrepancy() -> None:
    own = [("man",)] * 5 + [("woman",)] * 3
    outcome = build((GENDER,), own, obedient((GENDER,), 4), plan_of((GENDER,), 8, weighting=PairWeighting.DISCREPANCY))
    assert refused(outcome).reason is RefusalReason.ALREADY_AT_TARGET
    own = [("man",)] * 8
    outcome = build((GENDER,), own, obedient((GENDER,), 4), plan_of((GENDER,), 8, weighting=PairWeighting.DISCREPANCY))
    assert [pair.weight for pair in built(outcome).preferences] == pytest.approx([1.0] * 4, abs=1e-12)


def test_weights_follow_the_enumeration() -> None:
    axes = (GENDER,)
    own = [("man",)] * 7 + [("woman",)]
    weights = {
        weighting: [
            pair.weight
            for pair in built(build(axes, own, obedient(axes, 4), plan_of(axes, 8, weighting=weighting))).pairs
        ]
        for weighting in PairWeighting
    }
    assert weights[PairWeighting.EVEN] == [1.0] * 8
    assert set(weights[PairWeighting.CONTRAST]) == {0.0, 1.0}
    # 7 of 8: L2^2 = 2 (3/8)^2 = 0.28125, bias (1 - 50/64) / 7 = 0.03125, farthest 1/2.
    expected = [math.sqrt(0.5) * weight for weight in weights[PairWeighting.CONTRAST]]
    assert weights[PairWeighting.DISCREPANCY] == pytest.approx(expected, abs=1e-12)
    # A pair from man to woman closes a gap of 3/8 on either group.
    assert set(weights[PairWeighting.AXIS]) == {0.0, 0.75}


def test_what_is_left_on_an_axis_is_taken_over_all_prompts() -> None:
    axes = (GENDER, TONE)
    neutral, _ = FAMILIES[axes]
    every_tone = [str(tone) for tone in TONE.groups]
    men = samples_of(neutral, [("man", tone) for tone in every_tone] * 2)
    either = samples_of(neutral, [("man", tone) for tone in every_tone] + [("woman", tone) for tone in every_tone])
    plans = [plan_of(axes, 10)] * 2
    gender, tone, _ = axis_excess([men, men], plans)
    # All men: the whole distance; two of each of five tones: less than chance, so nothing.
    assert (gender, tone) == (pytest.approx(1), 0)
    assert 0 < axis_excess([men, either], plans)[0] < gender
    # Men alone where women alone are wanted, and nothing left where men alone are.
    beyond = [plan_of((GENDER,), 10, target=np.array(shares)) for shares in ([0.0, 1.0], [1.0, 0.0])]
    only_men = samples_of(neutral, [("man",)] * 10)
    assert axis_excess([only_men, only_men], beyond) == (pytest.approx(math.sqrt(0.5)),)
    scaled = plan_of((GENDER,), 8, weighting=PairWeighting.AXIS, axis_scales=(0.5,))
    weights = {pair.weight for pair in built(build((GENDER,), [("man",)] * 8, obedient((GENDER,), 4), scaled)).pairs}
    # Half of the gap of 1/2 on either group.
    assert weights == {0.0, 0.5}


def test_towards_a_target() -> None:
    target = np.array([0.25, 0.75])
    outcome = built(build((GENDER,), [("man",)] * 8, obedient((GENDER,), 8), plan_of((GENDER,), 8, target=target)))
    assert outcome.preferred.counts[-1].counts == (2, 6)
    assert outcome.preferred.counts[-1].discrepancy == pytest.approx(0, abs=1e-12)
    # A target that wants no men needs no winners among them.
    only_women = {("woman",): obedient((GENDER,), 8)[("woman",)]}
    plan = plan_of((GENDER,), 8, target=np.array([0.0, 1.0]))
    assert built(build((GENDER,), [("man",)] * 8, only_women, plan)).preferred.counts[-1].counts == (0, 8)


def test_targets_of_the_axes_are_marginals_of_the_crossed_one() -> None:
    target = np.arange(1.0, 11.0) / 55
    on_gender, on_tone, crossed = plan_of((GENDER, TONE), 8, target=target).targets()
    assert on_gender == pytest.approx([15 / 55, 40 / 55])
    assert on_tone == pytest.approx([7 / 55, 9 / 55, 11 / 55, 13 / 55, 15 / 55])
    assert crossed is target


def test_count_rows_have_every_side_axis_and_group() -> None:
    axes = (GENDER, TONE)
    rows = built(build(axes, [LIGHT_MAN] * 20, obedient(axes, 2), plan_of(axes, 20))).count_rows()
    assert len(rows) == 2 * (2 + 5 + 10)
    sums = Counter[tuple[object, object]]()
    for row in rows:
        sums[row["side"], row["axis"]] += int(row["count"])
    names = ("perceived_gender", "perceived_skin_tone", "perceived_gender & perceived_skin_tone")
    assert sums == dict.fromkeys(product(("preferred", "dispreferred"), names), 20)
    assert {row["size"] for row in rows} == {20}
    assert {type(row["group"]) for row in rows} == {str}


def test_other_samples_make_another_population_id() -> None:
    axes, neutral = (GENDER,), FAMILIES[(GENDER,)][0]
    first = built(build(axes, [("man",)] * 8, obedient(axes, 4), plan_of(axes, 8)))
    next_round = [
        replace(sample, sample_id="round-1/x/" + str(sample.index)) for sample in samples_of(neutral, [("man",)] * 8)
    ]
    second = built(build_populations(neutral, next_round, obedient(axes, 4), plan_of(axes, 8)))
    assert first.population_id != second.population_id


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"target": np.array([1.0])}, {"target": np.array([0.5, 0.4])}, {"target": np.array([2.0, -1.0])}],
)
def test_impossible_plans_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        replace(plan_of((GENDER,), 4), **change)  # pyright: ignore[reportArgumentType]


def test_samples_and_cells_from_elsewhere_are_refused() -> None:
    neutral, prompts = FAMILIES[(GENDER,)]
    plan, own = plan_of((GENDER,), 2), samples_of(neutral, [("man",)] * 2)
    with pytest.raises(InvalidInput, match="no sample of 'a photo of a firefighter'"):
        build_populations(neutral, samples_of(prompts[("man",)], [("man",)]), {}, plan)
    with pytest.raises(UnknownName, match="unknown cell 'light'"):
        build_populations(neutral, own, {("light",): []}, plan)
    with pytest.raises(UnknownName, match="unknown group of perceived_gender 'light'"):
        build_populations(neutral, samples_of(neutral, [("light",)] * 2), obedient((GENDER,), 1), plan)
    with pytest.raises(InvalidInput, match="one for each axis: 1"):
        build_populations(neutral, samples_of(neutral, [("man", "dark")]), obedient((GENDER,), 1), plan)


def test_group_counts_have_zeros_and_unknowns() -> None:
    counts, unknown = group_counts(["dark", None, "light", "dark"], TONE)
    assert (counts.tolist(), unknown) == ([1, 0, 0, 0, 2], 1)
    counts, unknown = group_counts([], TONE)
    assert (counts.tolist(), unknown) == ([0] * 5, 0)


@given(
    size=st.integers(1, 60),
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 99),
)
def test_allocation_is_the_target_in_whole_numbers(size: int, weights: list[int], seed: int) -> None:
    target = np.array(weights) / sum(weights)
    rng = np.random.default_rng(seed)
    counts = allocate(size, target, np.full(len(weights), size), rng)
    assert counts.sum() == size
    assert np.abs(counts - size * target).max() < 1
    assert not counts[target == 0].any()


@given(
    size=st.integers(1, 40),
    available=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_scarce_cells_shrink_an_even_population_as_little_as_possible(
    size: int, available: list[int], seed: int
) -> None:
    cells = len(available)
    counts = allocate(size, np.full(cells, 1 / cells), np.array(available), np.random.default_rng(seed))
    least = min(available)
    assert counts.sum() == min(size, least * cells + sum(one > least for one in available))
    assert counts.max() - counts.min() <= 1
    assert (counts <= available).all()


def test_the_remainder_is_drawn_by_lot() -> None:
    rng = np.random.default_rng(0)
    extra = Counter(int(allocate(6, np.full(5, 0.2), np.full(5, 9), rng).argmax()) for _ in range(500))
    # 500 draws over 5 cells: 100 +- 9; five standard deviations either way.
    assert all(55 <= extra[cell] <= 145 for cell in range(5))
