"""What the schedule runs: a run a night, named by its date, compared with the night before."""

from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows.debias import debias
from flows.holding import holding
from flows.outcome import outcome, summary_of
from popalign_core.execution import AUTO, Execution
from popalign_core.presets import PresetName, chosen_config
from tasks.drift import report_drift
from tasks.registry import promote_model, starting_config
from tasks.trend import refresh_trend


@flow(name="nightly", flow_run_name="nightly {preset_name}")
def nightly(
    preset_name: PresetName = "emoji",
    model: str = "",
    start_from: Literal["base", "current"] = "base",
    promote: bool = False,
    settings: list[str] = [],  # noqa: B006 - Prefect shows the default in its form, and nobody changes it
    workspace: str = "",
    execution: Execution = AUTO,
) -> State[Any]:
    """Runs the whole pipeline under the id nightly-<preset>-<date>, and reports drift of the base model.

    The date is the scheduled one: a retry on the next day goes on with the same run.

    Args:
        preset_name: Configuration to start from.
        model: Pipeline folder or hub id; empty = the preset's.
        start_from: base = the configured model; current = the model last promoted in this workspace, if any.
        promote: Whether a model that passes every check becomes the current one.
        settings: Changes to the preset, each as stage.field=value.
        workspace: Folder of the workspace; empty = the worker's own.
        execution: Where the work is done.
    """
    config = chosen_config(preset_name, [*settings, *([f"model={model}"] if model else [])], None)
    if start_from == "current":
        config = starting_config(workspace, config)
    series = f"nightly-{preset_name}-"
    run_id = f"{series}{flow_run.scheduled_start_time:%Y%m%d}"
    with holding(workspace, run_id):
        state: State[Any] = debias(
            run_id, preset_name, config=config, workspace=workspace, execution=execution, return_state=True
        )
    summary = summary_of(state)
    report_drift(workspace, run_id, series)
    refresh_trend(workspace)
    if promote and summary.verdict == "promote":
        promote_model(workspace, run_id, reason="nightly run")
    # A state of its own: Prefect would sum up the one of debias as "1/1 states failed".
    return outcome(summary)
