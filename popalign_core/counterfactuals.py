"""The least change that takes a prompt's own images to the target: which to draw as another group, from the same noise.

Winner and loser of such a pair differ in the groups that change and in little else, so that a denoising error says
something about the group. Pairs that differ on several axes at once are decided by whichever is easiest to draw.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from popalign_core.expansion import Prompt
from popalign_core.population_counts import LabelledSample, PopulationPlan, count_side
from popalign_core.populations import Cell, CellYield, PopulationPair, Refusal, RefusalReason, pair_up
from popalign_core.seeds import derive_seed


@dataclass(frozen=True)
class Counterfactual:
    """An own sample, and the cell to draw it as. index: of the sample, so that the noise is the same."""

    sample_id: str
    index: int
    cell: Cell


def plan_counterfactuals(
    prompt_id: str, own: Sequence[LabelledSample], plan: PopulationPlan, seed: int
) -> list[Counterfactual]:
    """The samples to change and what into, so that every axis is as close to the plan's target as whole numbers allow.

    On each axis as few samples as possible change, at random among the groups that have too many, first those that no
    other axis changes. Samples with an unknown group stay out. The result does not depend on the order of `own`.
    """
    known = sorted((sample for sample in own if None not in sample.cell), key=lambda sample: sample.sample_id)
    rng = np.random.default_rng(derive_seed(seed, "counterfactuals", prompt_id))
    cells = [[str(group) for group in sample.cell] for sample in known]
    changed = np.zeros(len(known), dtype=bool)
    for position, (axis, target) in enumerate(zip(plan.axes, plan.targets(), strict=False)):
        groups = [cell[position] for cell in cells]
        wanted = dict(zip(map(str, axis.groups), target.tolist(), strict=True))
        leaving, arriving = _moves(groups, wanted, changed, rng)
        for row, group in zip(leaving, arriving, strict=True):
            cells[row][position] = group
        changed[leaving] = True
    rows = zip(known, cells, changed.tolist(), strict=True)
    return [Counterfactual(sample.sample_id, sample.index, tuple(cell)) for sample, cell, moved in rows if moved]


def _moves(
    groups: list[str], shares: Mapping[str, float], changed: np.ndarray, rng: np.random.Generator
) -> tuple[list[int], list[str]]:
    """Rows that leave their group, and the groups that they go to. shares: the target's, of the whole vocabulary."""
    counts = Counter(groups)
    exact = {group: round(share * len(groups), 9) for group, share in shares.items()}
    target = {group: int(wanted) for group, wanted in exact.items()}
    # The remainder goes to the largest fractions, and of equal ones to the largest groups: nobody moves for a
    # difference of one.
    order = sorted(shares, key=lambda group: (round(target[group] - exact[group], 9), -counts[group]))
    for group in order[: len(groups) - sum(target.values())]:
        target[group] += 1
    leaving: list[int] = []
    for group in shares:
        members = np.array([row for row, own in enumerate(groups) if own == group], dtype=np.int64)
        order = np.lexsort((rng.permutation(len(members)), changed[members]))
        leaving += members[order[: max(0, counts[group] - target[group])]].tolist()
    arriving = [group for group in shares for _ in range(max(0, target[group] - counts[group]))]
    return leaving, [arriving[place] for place in rng.permutation(len(arriving)).tolist()]


def pair_counterfactuals(
    neutral: Prompt,
    own: Sequence[LabelledSample],
    planned: Sequence[Counterfactual],
    drawn: Mapping[str, LabelledSample],
    plan: PopulationPlan,
) -> PopulationPair | Refusal:
    """The model's own population against the same one with the changed samples in place of theirs.

    drawn: the image of each planned change by the own sample's id; those not perceived as requested are left out, and
    their own samples stay on both sides. Only changed samples make pairs. The preferred side must be closer to the
    plan's target on the crossed axis.
    """
    yields = _yields(planned, drawn)
    kept = {
        change.sample_id: drawn[change.sample_id] for change in planned if drawn[change.sample_id].cell == change.cell
    }
    losers = sorted((sample for sample in own if None not in sample.cell), key=lambda sample: sample.sample_id)
    if not planned or not kept:
        reason = RefusalReason.TOO_FEW_WINNERS if planned else RefusalReason.ALREADY_AT_TARGET
        detail = f"{len(planned)} changes wanted of {len(losers)} known own samples, {len(kept)} perceived as requested"
        return Refusal(neutral.prompt_id, reason, detail, yields)
    winners = [kept.get(sample.sample_id, sample) for sample in losers]
    preferred, dispreferred = count_side(winners, plan), count_side(losers, plan)
    before, after = dispreferred.counts[-1].discrepancy, preferred.counts[-1].discrepancy
    if not after < before:
        detail = f"discrepancy {after:.4f} of the preferred side, {before:.4f} of the model's own"
        return Refusal(neutral.prompt_id, RefusalReason.PREFERRED_NOT_MORE_EVEN, detail, yields)
    result = pair_up(neutral, preferred, dispreferred, yields, plan)
    pairs = tuple(pair for pair in result.pairs if pair.winner_sample_id != pair.loser_sample_id)
    result = replace(result, pairs=pairs)
    if not result.preferences:
        detail = f"no pair has a weight above 0 under {plan.weighting.value!r}"
        return Refusal(neutral.prompt_id, RefusalReason.ALREADY_AT_TARGET, detail, yields)
    return result


def _yields(planned: Sequence[Counterfactual], drawn: Mapping[str, LabelledSample]) -> tuple[CellYield, ...]:
    cells = sorted({change.cell for change in planned})
    found: list[CellYield] = []
    for cell in cells:
        images = [drawn[change.sample_id] for change in planned if change.cell == cell]
        kept = sum(image.cell == cell for image in images)
        found.append(CellYield(cell, len(images), kept, sum(None in image.cell for image in images)))
    return tuple(found)
