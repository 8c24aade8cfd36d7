"""Labelled images of base and aligned model -> scores of the images, disparities, the decision."""

from prefect import flow

from flows.holding import holding
from flows.placement import resolved, run_shards
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef
from tasks.assessment import assess
from tasks.quality import missing_scores, score_shard
from tasks.run import run_config


@flow(name="measurement", flow_run_name="measurement {run_id} {model_id}")
def measurement(
    run_id: str,
    model_id: str = "round-1",
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
) -> ArtifactRef:
    """Measures disparity, obedience and quality of both models from their classified images, and decides.

    Args:
        run_id: Names the run inside the workspace.
        model_id: The model to compare with the base.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
    """
    settings = run_config(workspace, run_id, config)
    with holding(workspace, run_id):
        # Here: what a cluster's GPUs were lent for is over, and a scorer is loaded once.
        here = resolved(execution).model_copy(update={"placement": "process"})
        run_shards(score_shard, missing_scores(workspace, run_id, settings, model_id), here, settings)
        return assess(workspace, run_id, settings, model_id)
