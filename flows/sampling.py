"""Prompts -> images, shard by shard."""

from prefect import flow

from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef, is_committed
from tasks.progress import expect
from tasks.run import run_config
from tasks.sampling import images_missing, plan_shards, sample_shard


@flow(name="sampling", flow_run_name="sampling {run_id} {model_id} {purpose}")
def sampling(
    run_id: str,
    model_id: str = "base",
    purpose: str = "evaluation",
    workspace: str = "workspace",
    config: RunConfig | None = None,
) -> list[ArtifactRef]:
    """Draws the images of one purpose from one model; what is committed is not drawn again.

    Args:
        run_id: Names the run inside the workspace.
        model_id: base, or a model that the run has trained.
        purpose: evaluation, validation, trained, obedience or round-<n>.
        workspace: Folder of the workspace.
        config: Instead of the configuration that the run was started with.
    """
    settings = run_config(workspace, run_id, config)
    shards = plan_shards(workspace, run_id, settings, model_id, purpose)
    missing = [shard for shard in shards if not is_committed(shard)]
    if missing:
        expect(f"sampling {model_id} {purpose}", images_missing(shards, settings))
    for shard in missing:
        sample_shard(shard, settings)
    return shards
