"""Prompts x attribute axes -> `prompts`."""

from prefect import flow, get_run_logger

from flows.holding import holding
from popalign_core.config import RunConfig
from popalign_core.expansion import prompts_of
from popalign_core.presets import PresetName, preset
from storage.artifacts import ArtifactRef
from tasks.changed_settings import changed_settings, recorded_config
from tasks.expansion import write_prompts
from tasks.run import record_run


@flow(name="expansion", flow_run_name="expansion {run_id}")
def expansion(
    run_id: str, preset_name: PresetName = "emoji", workspace: str = "", config: RunConfig | None = None
) -> ArtifactRef:
    """Starts a run: records its configuration, and expands its prompts into neutral and identity-specific ones.

    Args:
        run_id: Names the run inside the workspace.
        preset_name: Configuration to start from.
        workspace: Folder of the workspace; empty = the worker's own.
        config: A whole configuration instead of the preset's.
    """
    settings = config or preset(preset_name)
    prompts_of(settings.expansion)  # a refused list must not take the run's id
    with holding(workspace, run_id):
        if changed := changed_settings(workspace, run_id, settings):
            get_run_logger().warning("the run goes on with other settings, up to rounding the same: %s", changed)
        record_run(workspace, run_id, preset_name, recorded_config(workspace, run_id, settings))
        return write_prompts(workspace, run_id, settings.expansion)
