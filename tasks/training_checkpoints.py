"""Checkpoints of a round: the trainer's state, and the records of its steps until then."""

import json
from dataclasses import asdict

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.checkpoint import TrainingState, begin, load_state, take_snapshot, write_snapshot
from popalign_core.alignment.processes import Processes
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord
from popalign_core.errors import TrainingDiverged
from storage.checkpoints import drop_latest, keep_latest, latest_checkpoint, staged_checkpoint
from storage.layout import Workspace
from tasks.training_errors import same_outcome

RECORDS = "records.json"


def last_state(
    policy: Policy, settings: AlignmentSettings, place: tuple[Workspace, str, str]
) -> tuple[TrainingState, list[StepRecord]]:
    """The last checkpoint, however many processes wrote it; the beginning where there is none.

    place: workspace, run and name of the checkpoints.
    """
    folder = latest_checkpoint(*place)
    if folder is None:
        return begin(policy, settings), []
    records = [StepRecord(**values) for values in json.loads((folder / RECORDS).read_text())]
    return load_state(policy, settings, folder), records


class RoundCheckpoints:
    """What a training that goes on leaves on the disk; every process calls alike, the first one writes.

    The loss of a step tells of the weights before its update. So a checkpoint counts as sound once the step after it
    was, and until then the one before is kept.
    """

    def __init__(self, place: tuple[Workspace, str, str], processes: Processes, step: int):
        """place: as for `last_state`. step: finished ones of the state that training goes on from."""
        self._place, self._processes = place, processes
        self._latest, self._sound = step, False

    def save(self, state: TrainingState, records: list[StepRecord]) -> None:
        """Call it between two steps. Raises: StorageFull; the one before then stays."""
        self._latest, self._sound = state.step, False
        snapshot = take_snapshot(state, keep=self._processes.is_first)
        with same_outcome(self._processes):
            if self._processes.is_first:
                with staged_checkpoint(*self._place, state.step) as staged:
                    write_snapshot(snapshot, staged)
                    (staged / RECORDS).write_text(json.dumps([asdict(record) for record in records]))

    def step_was_sound(self) -> None:
        """And with it the state before it."""
        if not self._sound and self._processes.is_first:
            keep_latest(*self._place)
        self._sound = True

    def after(self, error: TrainingDiverged, state: TrainingState) -> TrainingDiverged:
        """The error, with what is left to go on from. A checkpoint that the very next step diverged from is removed."""
        with same_outcome(self._processes):
            if self._processes.is_first and state.step == self._latest:
                drop_latest(*self._place)
        kept = latest_checkpoint(*self._place)
        left = "No checkpoint is left" if kept is None else f"The checkpoint of step {kept.name} is kept"
        again = "the same run would begin anew" if kept is None else "the same run would go on from there"
        way_out = f"{left}; {again} and, with these settings, come to the same step: change them in a new run."
        return type(error)(f"{error} {way_out}", **error.facts)
