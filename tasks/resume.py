"""Runs that were started before, to go on with."""

from collections.abc import Sequence
from dataclasses import dataclass

from popalign_core.config import RunConfig
from storage.errors import NotCommitted
from storage.layout import Workspace
from storage.tables import read_rows
from tasks.changed_settings import resumed_config
from tasks.run import run_config

LATEST = "latest"


@dataclass(frozen=True)
class RunStart:
    """What a run is started, or gone on, with."""

    run_id: str
    preset: str
    config: RunConfig


def started_run(workspace: str, wanted: str, settings: Sequence[str] = ()) -> RunStart:
    """A run as it was started, but for settings that may change since. wanted: its id, or latest.

    settings: each "alignment.field=value", see `changed_settings`. Raises: NotCommitted where there is none;
    InvalidInput.
    """
    place = Workspace.open(workspace)
    run_id = _latest(place) if wanted == LATEST else wanted
    config = resumed_config(run_config(workspace, run_id), settings)
    return RunStart(run_id, str(read_rows(place, run_id, "runs")[0]["preset"]), config)


def _latest(place: Workspace) -> str:
    starts = [(row["started_at"], run_id) for run_id in place.run_ids() for row in read_rows(place, run_id, "starts")]
    if not starts:
        raise NotCommitted(f"no run was started in {place.root} yet: popalign run emoji starts one.")
    return max(starts)[1]
