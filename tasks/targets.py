"""What the populations of a round are to look like, prompt by prompt."""

from collections.abc import Sequence

from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.overshoot import Populations, plan_past_target, plan_prompts
from popalign_core.population_counts import LabelledSample, PopulationPlan, by_prompt
from popalign_core.preferences import PairWeighting
from popalign_core.seeds import derive_seed
from tasks.labels import labelled_samples
from tasks.run import BASE


def own_samples(samples: Sequence[LabelledSample], prompt_ids: Sequence[str]) -> dict[str, list[LabelledSample]]:
    """The samples of each of the prompts, none where there are none."""
    found = by_prompt(samples)
    return {prompt_id: found.get(prompt_id, []) for prompt_id in prompt_ids}


def population_plans(
    workspace: str, run_id: str, config: RunConfig, model_id: str, round_index: int, own: Populations
) -> dict[str, PopulationPlan]:
    """The plan of every training prompt's populations in a round. own: the current model's neutral images by prompt."""
    plan = PopulationPlan(
        axes=tuple(AXES[name] for name in config.expansion.axes),
        size=config.populations.size,
        seed=derive_seed(config.seed, "populations", round_index),
        weighting=PairWeighting(config.populations.weighting),
    )
    if not config.populations.overshoot:
        return plan_prompts(plan, own)

    def labelled(model: str, purpose: str) -> list[LabelledSample]:
        return labelled_samples(workspace, run_id, config, model, purpose, "builder")

    validation = by_prompt(labelled(BASE, "validation")), by_prompt(labelled(model_id, "validation"))
    first = own_samples(labelled(BASE, "round-1"), list(own))
    past = {axis.name: config.populations.overshoot_of(axis.name) for axis in plan.axes}
    return plan_past_target(plan, own, first, validation, past)
