"""Perceived attributes -> preferred and dispreferred populations, and pairs."""

from prefect import flow

from flows.holding import holding
from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef
from tasks.populations import build_preferences
from tasks.run import run_config


@flow(name="populations", flow_run_name="populations {run_id} round {round_index}")
def populations(
    run_id: str,
    model_id: str = "base",
    round_index: int = 1,
    workspace: str = "",
    config: RunConfig | None = None,
) -> ArtifactRef:
    """Builds the preferences of one round from the images of the current model.

    Args:
        run_id: Names the run inside the workspace.
        model_id: The model whose images are used.
        round_index: The round, from 1.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
    """
    settings = run_config(workspace, run_id, config)
    with holding(workspace, run_id):
        return build_preferences(workspace, run_id, settings, model_id, round_index)
