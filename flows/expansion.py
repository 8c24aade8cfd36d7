"""Prompts x attribute axes -> `prompts`."""

from prefect import flow

from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef
from tasks.expansion import write_prompts


@flow(name="expansion", flow_run_name="expansion {run_id}", validate_parameters=True)
def expansion(run_id: str, workspace: str = "workspace", config: RunConfig = RunConfig()) -> ArtifactRef:  # noqa: B008
    """Expands the prompt sets into neutral and identity-specific prompts.

    Args:
        run_id: Names the run inside the workspace.
        workspace: Folder of the workspace.
        config: The run's configuration; this stage reads its `expansion` part.
    """
    return write_prompts(workspace, run_id, config.expansion)
