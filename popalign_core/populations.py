"""Preferred and dispreferred populations of a neutral prompt, or the reason why there are none."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np

from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.expansion import Prompt
from popalign_core.population_counts import LabelledSample, PopulationPlan, Side, count_side, group_positions
from popalign_core.preferences import Preference, excess_discrepancy, match_losers, pair_weights
from popalign_core.seeds import derive_seed

Cell = tuple[str, ...]
# Two discrepancies this close differ by rounding only.
_TIE = 1e-9


class RefusalReason(StrEnum):
    """Why a prompt has no pairs.

    already_at_target: under the weighting chosen no pair would move the population closer.
    """

    TIE = "tie"
    PREFERRED_NOT_MORE_EVEN = "preferred_not_more_even"
    TOO_FEW_WINNERS = "too_few_winners"
    TOO_FEW_OWN_SAMPLES = "too_few_own_samples"
    ALREADY_AT_TARGET = "already_at_target"


@dataclass(frozen=True)
class CellYield:
    """What became of the samples drawn for one cell: kept, perceived as another cell, or unknown on some axis."""

    cell: Cell
    drawn: int
    kept: int
    unknown: int

    @property
    def discard_rate(self) -> float:
        """Share that was not perceived as requested, unknown ones included; nan where nothing was drawn."""
        return 1 - self.kept / self.drawn if self.drawn else float("nan")


@dataclass(frozen=True)
class PopulationPair:
    """Both populations of one prompt and their pairs, each sample in one pair.

    pairs: all of them, those of weight 0 too; `preferences` are the ones to train on.
    """

    population_id: str
    prompt_id: str
    preferred: Side
    dispreferred: Side
    pairs: tuple[Preference, ...]
    yields: tuple[CellYield, ...]

    @property
    def preferences(self) -> tuple[Preference, ...]:
        """The pairs of a weight above 0, at least one."""
        return tuple(pair for pair in self.pairs if pair.weight > 0)

    @property
    def size(self) -> int:
        """Samples a side."""
        return len(self.pairs)

    def count_rows(self) -> list[dict[str, str | int | float]]:
        """A record for each side, measured axis and group, zeros included."""
        identity: dict[str, str | int | float] = {"population_id": self.population_id, "prompt_id": self.prompt_id}
        return [
            {
                **identity,
                "side": name,
                "axis": on.axis.name,
                "group": str(group),
                "count": count,
                "target": share,
                "size": self.size,
                "unknown": on.unknown,
            }
            for name, side in (("preferred", self.preferred), ("dispreferred", self.dispreferred))
            for on in side.counts
            for group, count, share in zip(on.axis.groups, on.counts, on.target, strict=True)
        ]


@dataclass(frozen=True)
class Refusal:
    """A prompt without pairs, and why."""

    prompt_id: str
    reason: RefusalReason
    detail: str
    yields: tuple[CellYield, ...]


def build_populations(
    neutral: Prompt,
    own: Sequence[LabelledSample],
    specific: Mapping[Cell, Sequence[LabelledSample]],
    plan: PopulationPlan,
) -> PopulationPair | Refusal:
    """Winners from the identity-specific samples perceived as requested, losers from the model's own neutral samples.

    own: samples of the neutral prompt. specific: samples by the cell that their prompt requests; a cell that is absent
    has none. The result depends on neither order. See `allocate` for the counts per cell, `_draw_winners` and
    `match_losers` for who is drawn and paired. Evenness is compared on the crossed axis.
    Raises: UnknownName for a cell or group outside the axes; InvalidInput for samples of another prompt.
    """
    _require_own(neutral, own)
    _require_cells([*own, *(sample for samples in specific.values() for sample in samples)], plan.axes)
    valid, yields = _sort_specific(specific, plan.axes)
    crossed_target = plan.targets()[-1]
    rng = np.random.default_rng(derive_seed(plan.seed, "populations", neutral.prompt_id))

    def refuse(reason: RefusalReason, detail: str) -> Refusal:
        return Refusal(neutral.prompt_id, reason, detail, yields)

    if missing := _groups_without(valid, plan):
        return refuse(RefusalReason.TOO_FEW_WINNERS, f"no sample was perceived as requested for: {'; '.join(missing)}")
    allocation = allocate(plan.size, crossed_target, np.array([len(samples) for samples in valid.values()]), rng)
    if not (size := int(allocation.sum())):
        return refuse(RefusalReason.TOO_FEW_WINNERS, "the target cannot be met by the samples at any size")
    known = sum(None not in sample.cell for sample in own)
    if len(own) < size or not known:
        return refuse(
            RefusalReason.TOO_FEW_OWN_SAMPLES, f"{len(own)} own samples, {known} with a known cell; {size} are needed"
        )
    own = sorted(own, key=_by_identity)
    winners = _draw_winners(valid, allocation, {sample.index for sample in own}, rng)
    positions = match_losers([sample.index for sample in winners], [sample.index for sample in own], rng)
    preferred = count_side(winners, plan)
    dispreferred = count_side([own[position] for position in positions], plan)
    before, after = dispreferred.counts[-1].discrepancy, preferred.counts[-1].discrepancy
    if np.isnan(before):
        return refuse(RefusalReason.TOO_FEW_OWN_SAMPLES, "none of the own samples drawn has a known cell")
    if not after < before - _TIE:
        reason = RefusalReason.TIE if after <= before + _TIE else RefusalReason.PREFERRED_NOT_MORE_EVEN
        return refuse(reason, f"discrepancy {after:.4f} of the preferred side, {before:.4f} of the model's own")
    result = pair_up(neutral, preferred, dispreferred, yields, plan)
    if not result.preferences:
        return refuse(RefusalReason.ALREADY_AT_TARGET, f"no pair has a weight above 0 under {plan.weighting.value!r}")
    return result


def allocate(size: int, target: np.ndarray, available: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples to draw for every cell, (cells,) int64, as close to the target's shares as whole numbers allow.

    Each cell gets its share rounded down, and the remainder goes to the largest fractions; among equal ones to cells
    that have samples to spare, then at random. Where a cell has too few samples for that, the whole population is made
    smaller, by as little as possible, instead of less even. All zeros where no size will do.
    """
    lots = rng.permutation(len(target))
    for total in range(size, 0, -1):
        exact = np.round(total * target, 9)
        counts = np.floor(exact).astype(np.int64)
        spare = available > counts
        order = np.lexsort((lots, ~spare, np.round(counts - exact, 9)))
        counts[order[: total - int(counts.sum())]] += 1
        if (counts <= available).all():
            return counts
    return np.zeros(len(target), dtype=np.int64)


def _groups_without(valid: Mapping[Cell, Sequence[LabelledSample]], plan: PopulationPlan) -> list[str]:
    """Groups of single axes that the target wants and nobody was perceived as.

    A crossed cell alone may stay empty: the population is then smaller, and its groups are still balanced.
    """
    available = np.array([len(samples) for samples in valid.values()]).reshape([len(axis.groups) for axis in plan.axes])
    missing: list[str] = []
    for position, (axis, target) in enumerate(zip(plan.axes, plan.targets(), strict=False)):
        others = tuple(other for other in range(len(plan.axes)) if other != position)
        found = available.sum(axis=others)
        wanted = zip(axis.groups, found, target, strict=True)
        missing += [group for group, count, share in wanted if share and not count]
    return missing


def _draw_winners(
    valid: Mapping[Cell, Sequence[LabelledSample]],
    allocation: np.ndarray,
    own_indices: set[int],
    rng: np.random.Generator,
) -> list[LabelledSample]:
    """Without replacement; first those that can meet an own sample of their index which no winner has taken yet."""
    free = set(own_indices)
    winners: list[LabelledSample] = []
    for samples, wanted in zip(valid.values(), allocation.tolist(), strict=True):
        order: list[int] = rng.permutation(len(samples)).tolist()
        chosen = sorted((samples[position] for position in order), key=lambda sample: sample.index not in free)[:wanted]
        free -= {sample.index for sample in chosen}
        winners += chosen
    return winners


def _sort_specific(
    specific: Mapping[Cell, Sequence[LabelledSample]], axes: Sequence[Axis]
) -> tuple[dict[Cell, list[LabelledSample]], tuple[CellYield, ...]]:
    """The samples perceived as requested for every cell of the axes, in the order of `cross_axes`, and the yields."""
    cells: list[Cell] = [tuple(map(str, cell)) for cell in product(*(axis.groups for axis in axes))]
    for cell in specific:
        if cell not in cells:
            raise UnknownName(kind="cell", got=" & ".join(cell), known=[" & ".join(known) for known in cells])
    valid: dict[Cell, list[LabelledSample]] = {}
    yields: list[CellYield] = []
    for cell in cells:
        drawn = specific.get(cell, ())
        valid[cell] = sorted((sample for sample in drawn if sample.cell == cell), key=_by_identity)
        yields.append(CellYield(cell, len(drawn), len(valid[cell]), sum(None in sample.cell for sample in drawn)))
    return valid, tuple(yields)


def pair_up(
    neutral: Prompt, preferred: Side, dispreferred: Side, yields: tuple[CellYield, ...], plan: PopulationPlan
) -> PopulationPair:
    """Samples of both sides one to one in their order, weighted by what the dispreferred side lacks."""
    own = [np.array(counts.counts) for counts in dispreferred.counts]
    targets = plan.targets()
    scales = plan.axis_scales or [1.0] * len(targets)
    gaps = [
        scale * (target - count / max(int(count.sum()), 1))
        for scale, target, count in zip(scales, targets, own, strict=True)
    ]
    sides = preferred.samples, dispreferred.samples
    winners, losers = (group_positions(samples, plan) for samples in sides)
    weights = pair_weights(winners, losers, gaps, plan.weighting, excess_discrepancy(own[-1], targets[-1]))
    members = "\n".join([neutral.prompt_id, *(sample.sample_id for samples in sides for sample in samples)])
    population_id = hashlib.blake2b(members.encode(), digest_size=6).hexdigest()
    pairs = tuple(
        Preference(
            pair_id=f"{population_id}/{number}",
            population_id=population_id,
            prompt_id=neutral.prompt_id,
            caption=neutral.text,
            winner_sample_id=winner.sample_id,
            loser_sample_id=loser.sample_id,
            weight=weight,
        )
        for number, (winner, loser, weight) in enumerate(zip(*sides, weights.tolist(), strict=True))
    )
    return PopulationPair(population_id, neutral.prompt_id, preferred, dispreferred, pairs, yields)


def _require_own(neutral: Prompt, own: Sequence[LabelledSample]) -> None:
    strangers = [sample.sample_id for sample in own if sample.prompt_id != neutral.prompt_id]
    if strangers:
        raise InvalidInput(f"{strangers[0]!r} is no sample of {neutral.text!r} ({neutral.prompt_id}).")


def _require_cells(samples: Sequence[LabelledSample], axes: Sequence[Axis]) -> None:
    for sample in samples:
        if len(sample.cell) != len(axes):
            raise InvalidInput(
                f"{sample.sample_id!r} has {len(sample.cell)} labels, expected one for each axis: {len(axes)}."
            )


def _by_identity(sample: LabelledSample) -> tuple[int, str]:
    return sample.index, sample.sample_id
