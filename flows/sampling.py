"""Prompts -> images, shard by shard."""

from prefect import flow

from flows.holding import holding
from flows.placement import resolved, run_shards
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef
from tasks.memory_plan import require_memory
from tasks.progress import expect
from tasks.run import run_config
from tasks.sampling import images_missing, plan_shards, sample_shard
from tasks.shards import missing_samples


@flow(name="sampling", flow_run_name="sampling {run_id} {model_id} {purpose}")
def sampling(
    run_id: str,
    model_id: str = "base",
    purpose: str = "evaluation",
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
) -> list[ArtifactRef]:
    """Draws the images of one purpose from one model; what is committed, or being drawn elsewhere, is left out.

    Args:
        run_id: Names the run inside the workspace.
        model_id: base, or a model that the run has trained.
        purpose: evaluation, validation, trained, obedience or round-<n>.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
    """
    settings = run_config(workspace, run_id, config)
    with holding(workspace, run_id):
        shards = plan_shards(workspace, run_id, settings, model_id, purpose)
        missing = missing_samples(workspace, run_id, settings, model_id, purpose)
        work = f"sampling {model_id} {purpose}"
        place = resolved(execution)
        if missing:
            if place.placement != "ray":  # whose nodes are other machines
                require_memory(settings, place, "sampling")
            expect(work, images_missing(shards, settings), "images")
        run_shards(sample_shard, missing, place, settings, work=work)
    return shards
