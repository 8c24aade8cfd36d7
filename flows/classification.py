"""Images -> perceived attributes."""

from typing import Literal

from prefect import flow

from flows.holding import holding
from flows.placement import resolved, run_shards
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef, is_committed
from tasks.agreement import only_for_agreement
from tasks.classification import attributes_of, check_classified, classify_shard
from tasks.run import BASE, run_config
from tasks.sampling import plan_shards
from tasks.shards import missing_attributes


@flow(name="classification", flow_run_name="classification {run_id} {model_id} {purpose} {role}")
def classification(
    run_id: str,
    model_id: str = "base",
    purpose: str = "evaluation",
    role: Literal["builder", "judge"] = "judge",
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
) -> list[ArtifactRef]:
    """Classifies the images of one purpose; every image gets a row on every axis.

    Args:
        run_id: Names the run inside the workspace.
        model_id: base, or a model that the run has trained.
        purpose: evaluation, validation, trained, obedience or round-<n>.
        role: builder (makes preferences) or judge (judges the assessment).
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
    """
    settings = run_config(workspace, run_id, config)
    with holding(workspace, run_id):
        shards = plan_shards(workspace, run_id, settings, model_id, purpose)
        missing = missing_attributes(workspace, run_id, settings, model_id, purpose, role)
        run_shards(classify_shard, missing, resolved(execution), settings)
        found = [attributes_of(shard, role) for shard in shards]
        # Other workers may still be at some; the last one checks.
        needed = model_id == BASE and not only_for_agreement(purpose, role)
        if needed and all(is_committed(ref) for ref in found):
            check_classified(shards, role, settings)
    return found
