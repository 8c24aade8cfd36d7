"""How far past the target training prompts are to go, so that prompts nobody trained on arrive there.

What a model learns about the prompts it is trained on carries over to others only in part. While validation prompts
still lean, each training prompt is therefore aimed past the target, to the side opposite to its own first lean; what is
left on validation prompts says how far, so that it comes to rest where they arrive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from popalign_core.attributes import Axis
from popalign_core.population_counts import LabelledSample, PopulationPlan, axis_excess, group_counts
from popalign_core.preferences import PairWeighting

Populations = Mapping[str, Sequence[LabelledSample]]

# A group that nobody is to show any more would leave a prompt as skewed as before.
_LEAST_SHARE = 0.02
# A dozen images of one group do not show that the prompt has no other: as if this many more had been on target.
_PRIOR_IMAGES = 2.0


def plan_prompts(plan: PopulationPlan, own: Populations) -> dict[str, PopulationPlan]:
    """The plan for every prompt alike, with what is left on each axis where the weighting asks for it.

    own: the current model's images by training prompt.
    """
    return _scaled(dict.fromkeys(own, plan), own)


def plan_past_target(
    plan: PopulationPlan,
    own: Populations,
    first: Populations,
    validation: tuple[Populations, Populations],
    past: Mapping[str, float],
) -> dict[str, PopulationPlan]:
    """As `plan_prompts`, each training prompt aimed past the uniform target, each axis by itself.

    first: the images of the base model by training prompt. validation: images of the same validation prompts, of the
    base model and of the current one. past: by axis, how many times the lean that validation prompts keep; 0
    where not given.
    """
    marginals: list[list[np.ndarray]] = []
    for position, axis in enumerate(plan.axes):
        target = axis.uniform()
        before, now = (prompt_shares([found[p] for p in sorted(found)], position, axis) for found in validation)
        kept = kept_lean(before, now, target)
        leans = prompt_shares([first[prompt_id] for prompt_id in own], position, axis)
        marginals.append([aimed_target(target, lean, past.get(axis.name, 0.0) * kept) for lean in leans])
    crossed = [reduce(np.outer, parts).ravel() for parts in zip(*marginals, strict=True)]
    return _scaled({prompt: replace(plan, target=target) for prompt, target in zip(own, crossed, strict=True)}, own)


def _scaled(plans: dict[str, PopulationPlan], own: Populations) -> dict[str, PopulationPlan]:
    if all(plan.weighting is not PairWeighting.AXIS for plan in plans.values()):
        return plans
    scales = axis_excess([own[prompt_id] for prompt_id in plans], list(plans.values()))
    return {prompt_id: replace(plan, axis_scales=scales) for prompt_id, plan in plans.items()}


def prompt_shares(populations: Sequence[Sequence[LabelledSample]], position: int, axis: Axis) -> np.ndarray:
    """Shares of the groups in each population, (populations, groups), drawn towards the uniform target as by a prior.

    position: of the axis among the samples' cells. Unknown images are left out.
    """
    counts = [group_counts([sample.cell[position] for sample in samples], axis)[0] for samples in populations]
    table = np.array(counts, dtype=np.float64).reshape(-1, len(axis.groups))
    return (table + _PRIOR_IMAGES * axis.uniform()) / (table.sum(axis=1, keepdims=True) + _PRIOR_IMAGES)


def kept_lean(before: np.ndarray, now: np.ndarray, target: np.ndarray) -> float:
    """The part of their first departure from the target that prompts keep, 0 to 1.

    before, now: (prompts, groups) shares of the same prompts; target: (groups,). The slope of the least-squares line
    through the origin, departures now on departures before, so that prompts that leaned most count most. 0 where none
    leaned.
    """
    lean, left = before - target, now - target
    total = float(np.square(lean).sum())
    return float(np.clip((lean * left).sum() / total, 0, 1)) if total > 0 else 0.0


def aimed_target(target: np.ndarray, before: np.ndarray, past: float) -> np.ndarray:
    """The target moved against a prompt's first lean: target - past * (before - target), as shares, (groups,).

    past: 0 is the target itself. No group gets less than a fiftieth before the shares are made to sum to 1.
    """
    aimed = np.maximum(target - past * (before - target), _LEAST_SHARE) if past > 0 else target
    return aimed / aimed.sum()
