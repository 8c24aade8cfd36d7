"""Labelled images of base and aligned model -> disparities, scores, the decision."""

from prefect import flow

from flows.holding import holding
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef
from tasks.assessment import assess
from tasks.run import run_config


@flow(name="measurement", flow_run_name="measurement {run_id} {model_id}")
def measurement(
    run_id: str,
    model_id: str = "round-1",
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,  # noqa: ARG001 - every stage that workers run takes it
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
        return assess(workspace, run_id, settings, model_id)
