"""Which images of a round are drawn again as another group."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.config import RunConfig
from popalign_core.counterfactuals import Counterfactual, plan_counterfactuals
from popalign_core.expansion import Prompt
from popalign_core.population_counts import LabelledSample
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.labels import labelled_samples
from tasks.run import read_prompts, reference
from tasks.targets import own_samples, population_plans


@task(cache_policy=NO_CACHE)
def write_counterfactuals(
    workspace: str, run_id: str, config: RunConfig, model_id: str, round_index: int
) -> ArtifactRef:
    """Commits `counterfactuals`: the least change that takes every training prompt's own images to the target."""
    ref = reference(workspace, run_id, "counterfactuals", f"round-{round_index}")
    if is_committed(ref):
        return ref
    prompts = [prompt for prompt in read_prompts(workspace, run_id) if prompt.split == "train"]
    samples = labelled_samples(workspace, run_id, config, model_id, f"round-{round_index}", "builder")
    own = own_samples(samples, [prompt.prompt_id for prompt in prompts if prompt.kind == "neutral"])
    plans = population_plans(workspace, run_id, config, model_id, round_index, own)
    seed = derive_seed(config.seed, "counterfactuals", round_index)
    rows: list[dict[str, object]] = []
    for prompt_id, mine in own.items():
        targets = {other.cell: other.prompt_id for other in prompts if other.parent_id == prompt_id}
        for change in plan_counterfactuals(prompt_id, mine, plans[prompt_id], seed):
            target = targets[change.cell]
            row = {"run_id": run_id, "round": round_index, "prompt_id": prompt_id, "target_prompt_id": target}
            row |= {"own_sample_id": change.sample_id, "sample_id": f"{model_id}/{target}/{change.index}"}
            rows.append({**row, "sample_index": change.index})
    with staged_artifact(ref) as folder:
        write_rows(folder, "counterfactuals", rows)
    return ref


def read_counterfactuals(
    ref: ArtifactRef, prompts: dict[str, Prompt], drawn: list[LabelledSample]
) -> dict[str, tuple[list[Counterfactual], dict[str, LabelledSample]]]:
    """By neutral prompt: the planned changes, and the image of each by the own sample's id."""
    image = {sample.sample_id: sample for sample in drawn}
    found: dict[str, tuple[list[Counterfactual], dict[str, LabelledSample]]] = {}
    for row in read_artifact(ref, "counterfactuals"):
        planned, images = found.setdefault(row["prompt_id"], ([], {}))
        cell = prompts[row["target_prompt_id"]].cell
        planned.append(Counterfactual(row["own_sample_id"], row["sample_index"], cell))
        images[row["own_sample_id"]] = image[row["sample_id"]]
    return found
