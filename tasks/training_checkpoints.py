"""Checkpoints of a round: the trainer's state, and the records of its steps until then."""

import json
from dataclasses import asdict

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.checkpoint import Snapshot, TrainingState, begin, load_state, write_snapshot
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord
from storage.checkpoints import latest_checkpoint, staged_checkpoint
from storage.layout import Workspace

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


def save_checkpoint(snapshot: Snapshot, records: list[StepRecord], place: tuple[Workspace, str, str]) -> None:
    """Takes the place of the one before. Raises: StorageFull; the one before then stays."""
    with staged_checkpoint(*place, records[-1].step) as staged:
        write_snapshot(snapshot, staged)
        (staged / RECORDS).write_text(json.dumps([asdict(record) for record in records]))
