"""Preferred and dispreferred populations of one round."""

from dataclasses import asdict

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES, CROSSING, Axis
from popalign_core.config import RunConfig
from popalign_core.counterfactuals import Counterfactual, pair_counterfactuals
from popalign_core.expansion import Prompt
from popalign_core.population_counts import LabelledSample
from popalign_core.populations import PopulationPair, Refusal, build_populations
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.counterfactuals import read_counterfactuals
from tasks.labels import labelled_samples
from tasks.run import read_prompts, reference
from tasks.samplers import report_differences
from tasks.sampling import plan_shards
from tasks.targets import own_samples, population_plans

Changes = dict[str, tuple[list[Counterfactual], dict[str, LabelledSample]]]
TABLES = ("populations", "preferences", "refusals", "yields")


@task(cache_policy=NO_CACHE)
def build_preferences(workspace: str, run_id: str, config: RunConfig, model_id: str, round_index: int) -> ArtifactRef:
    """Commits `populations`, `preferences`, `refusals` and `yields` of a round, from the current model's images."""
    ref = reference(workspace, run_id, "populations", f"round-{round_index}")
    if is_committed(ref):
        return ref
    axes = [AXES[name] for name in config.expansion.axes]
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(workspace, run_id) if prompt.split == "train"}
    samples = labelled_samples(workspace, run_id, config, model_id, f"round-{round_index}", "builder")
    own = own_samples(samples, [prompt_id for prompt_id, prompt in prompts.items() if prompt.kind == "neutral"])
    plans = population_plans(workspace, run_id, config, model_id, round_index, own)
    specific = _specific(prompts, samples, axes)
    purposes = [f"round-{round_index}"]
    changes: Changes = {}
    if config.populations.winners == "counterfactual":
        purposes.append(f"counterfactual-{round_index}")
        planned = reference(workspace, run_id, "counterfactuals", f"round-{round_index}")
        drawn = labelled_samples(workspace, run_id, config, model_id, f"counterfactual-{round_index}", "builder")
        changes = read_counterfactuals(planned, prompts, drawn)
    shards = [s for purpose in purposes for s in plan_shards(workspace, run_id, config, model_id, purpose)]
    report_differences(f"populations of round {round_index}", f"populations.round-{round_index}", shards)
    found: dict[str, list[dict[str, object]]] = {name: [] for name in TABLES}
    for prompt_id, mine in own.items():
        prompt = prompts[prompt_id]
        if config.populations.winners == "counterfactual":
            outcome = pair_counterfactuals(prompt, mine, *changes.get(prompt_id, ([], {})), plans[prompt_id])
        else:
            outcome = build_populations(prompt, mine, specific.get(prompt_id, {}), plans[prompt_id])
        for name, rows in _rows(outcome).items():
            found[name] += [{"run_id": run_id, "round": round_index, **row} for row in rows]
    with staged_artifact(ref) as folder:
        for name, rows in found.items():
            write_rows(folder, name, rows)
    return ref


def has_pairs(populations: ArtifactRef) -> bool:
    """Whether there is anything to train on; not where every prompt was refused, or is at its target."""
    return bool(read_artifact(populations, "preferences"))


def _rows(outcome: PopulationPair | Refusal) -> dict[str, list[dict[str, object]]]:
    if isinstance(outcome, Refusal):
        row: dict[str, object] = {
            "prompt_id": outcome.prompt_id,
            "reason": str(outcome.reason),
            "detail": outcome.detail,
        }
        rows: dict[str, list[dict[str, object]]] = {"refusals": [row]}
    else:
        rows = {
            "populations": [dict(row) for row in outcome.count_rows()],
            "preferences": [asdict(pair) for pair in outcome.preferences],
        }
    rows["yields"] = [
        {
            "prompt_id": outcome.prompt_id,
            "group": CROSSING.join(cell.cell),
            "drawn": cell.drawn,
            "kept": cell.kept,
            "unknown": cell.unknown,
        }
        for cell in outcome.yields
    ]
    return rows


def _specific(
    prompts: dict[str, Prompt], samples: list[LabelledSample], axes: list[Axis]
) -> dict[str, dict[tuple[str, ...], list[LabelledSample]]]:
    """Identity-specific images by neutral prompt and requested cell, of all prompts in one pass over the images."""
    found: dict[str, dict[tuple[str, ...], list[LabelledSample]]] = {}
    place: dict[str, list[LabelledSample]] = {}
    for prompt in prompts.values():
        if prompt.parent_id is not None:
            cell = tuple(prompt.requested[axis.name] for axis in axes)
            place[prompt.prompt_id] = found.setdefault(prompt.parent_id, {}).setdefault(cell, [])
    for sample in samples:
        if sample.prompt_id in place:
            place[sample.prompt_id].append(sample)
    return found
