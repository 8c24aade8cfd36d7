"""Runs that were started before, to go on with."""

from dataclasses import dataclass

from popalign_core.config import RunConfig
from storage.errors import NotCommitted
from storage.layout import Workspace
from storage.tables import read_rows
from tasks.run import run_config

LATEST = "latest"


@dataclass(frozen=True)
class RunStart:
    """What a run is started, or gone on, with."""

    run_id: str
    preset: str
    config: RunConfig


def started_run(workspace: str, wanted: str) -> RunStart:
    """A run as it was started. wanted: its id, or latest. Raises: NotCommitted where there is none."""
    place = Workspace.open(workspace)
    run_id = _latest(place) if wanted == LATEST else wanted
    config = run_config(workspace, run_id)
    return RunStart(run_id, str(read_rows(place, run_id, "runs")[0]["preset"]), config)


def _latest(place: Workspace) -> str:
    starts = [(row["started_at"], run_id) for run_id in place.run_ids() for row in read_rows(place, run_id, "starts")]
    if not starts:
        raise NotCommitted(f"no run was started in {place.root} yet: popalign run emoji starts one.")
    return max(starts)[1]
