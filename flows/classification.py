"""Images -> perceived attributes."""

from typing import Literal

from prefect import flow

from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef, is_committed
from tasks.classification import attributes_of, check_classified, classify_shard
from tasks.run import BASE, run_config
from tasks.sampling import plan_shards


@flow(name="classification", flow_run_name="classification {run_id} {model_id} {purpose} {role}")
def classification(
    run_id: str,
    model_id: str = "base",
    purpose: str = "evaluation",
    role: Literal["builder", "judge"] = "judge",
    workspace: str = "workspace",
    config: RunConfig | None = None,
) -> list[ArtifactRef]:
    """Classifies the images of one purpose; every image gets a row on every axis.

    Args:
        run_id: Names the run inside the workspace.
        model_id: base, or a model that the run has trained.
        purpose: evaluation, validation, trained, obedience or round-<n>.
        role: builder (makes preferences) or judge (judges the assessment).
        workspace: Folder of the workspace.
        config: Instead of the configuration that the run was started with.
    """
    settings = run_config(workspace, run_id, config)
    shards = plan_shards(workspace, run_id, settings, model_id, purpose)
    for shard in shards:
        if not is_committed(attributes_of(shard, role)):
            classify_shard(shard, role, settings)
    if model_id == BASE:
        check_classified(shards, role, settings)
    return [attributes_of(shard, role) for shard in shards]
