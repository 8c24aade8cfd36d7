"""The whole pipeline: what the nightly schedule runs."""

from prefect import flow

from flows.alignment import alignment
from flows.assessment import assessment
from flows.expansion import expansion
from popalign_core.config import RunConfig
from popalign_core.presets import PresetName, preset
from storage.layout import Workspace
from storage.locks import run_lock
from tasks.reporting import publish_report, write_report
from tasks.summary import RunSummary, summarize_run


@flow(name="debias", flow_run_name="debias {run_id}")
def debias(
    run_id: str = "emoji-0",
    preset_name: PresetName = "emoji",
    workspace: str = "workspace",
    config: RunConfig | None = None,
) -> RunSummary:
    """Measures a model's population disparity, reduces it, measures again, and decides whether to promote.

    Calling it again with the same run id goes on from the last committed shard.

    Args:
        run_id: Names the run inside the workspace; the same id continues the same run.
        preset_name: Configuration to start from.
        workspace: Folder of the workspace.
        config: A whole configuration instead of the preset's.
    """
    settings = config or preset(preset_name)
    place = Workspace.open(workspace)
    with run_lock(place, run_id):
        expansion(run_id, preset_name, workspace, settings)
        kept = alignment(run_id, workspace, settings)
        assessment(run_id, kept, workspace, settings)
        report = write_report(workspace, run_id, settings)
        summary = summarize_run(workspace, run_id, str(report))
        publish_report(workspace, run_id, summary)
    return summary
