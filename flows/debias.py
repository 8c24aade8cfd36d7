"""The whole pipeline, from prompts to the decision."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.alignment import alignment
from flows.assessment import assessment
from flows.expansion import expansion
from flows.holding import holding
from flows.outcome import outcome
from flows.placement import resolved
from flows.repetition import repeat_training
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from popalign_core.presets import PresetName, chosen_config
from storage.image_latents import remove_latents
from storage.layout import Workspace
from tasks.inputs import check_inputs
from tasks.memory_plan import STAGES, require_memory
from tasks.publishing import publish_run
from tasks.reporting import write_report
from tasks.run import run_tags
from tasks.summary import summarize_run


@flow(name="debias", flow_run_name="debias {run_id}")
def debias(
    run_id: str = "emoji-0",
    preset_name: PresetName = "emoji",
    settings: list[str] = [],  # noqa: B006 - Prefect shows the default in its form, and nobody changes it
    config: RunConfig | None = None,
    workspace: str = "",
    execution: Execution = AUTO,
) -> State[Any]:
    """Measures a model's population disparity, reduces it, measures again, and decides whether to promote.

    Starting it again with the same run id goes on from the last committed shard.

    Args:
        run_id: Names the run inside the workspace; the same id continues the same run.
        preset_name: Configuration to start from.
        settings: Changes to the preset, each as stage.field=value, for example alignment.rounds=2.
        config: Every value. None = the preset with the settings.
        workspace: Folder of the workspace; empty = the worker's own.
        execution: Where the work is done.
    """
    chosen = chosen_config(preset_name, settings, config)
    check_inputs(chosen)
    place = resolved(execution)
    if place.placement == "process":  # before hours of sampling, and not only before the training
        require_memory(chosen, place, *STAGES)
    with holding(workspace, run_id), run_tags(preset_name, chosen):
        expansion(run_id, preset_name, workspace, chosen)
        kept = alignment(run_id, workspace, chosen, place)
        assessment(run_id, kept, workspace, chosen, place)
        repeat_training(run_id, kept, workspace, chosen, place)
        remove_latents(Workspace.open(workspace), run_id)
        report = write_report(workspace, run_id, chosen)
        summary = summarize_run(workspace, run_id, str(report))
        publish_run(workspace, run_id, summary)
    return outcome(summary)
