"""A round of the policy gradient: from prompts alone, through the builder and the decoder of the embedded model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from popalign_core.alignment.trainer import StepRecord
from popalign_core.config import with_settings
from popalign_core.errors import InvalidInput
from popalign_core.workload import workload
from storage.artifacts import ArtifactRef, artifact_digest
from storage.tables import read_artifact
from tasks import alignment
from tasks.alignment import align_round
from tasks.run import BASE, reference
from tasks.training_processes import ONE, TrainingProcesses

SETTINGS = {
    "alignment.objective": "reward",
    "alignment.rounds": "2",
    "alignment.steps": "2",
    "alignment.checkpoint_steps": "1",
    "alignment.learning_rate": "1e-4",
    "sampling.steps": "3",
    "reward.group_size": "3",
    "reward.groups": "2",
    "reward.trained_steps": "1",
}


def trained(run: Any, processes: TrainingProcesses = ONE) -> ArtifactRef:
    prompts = reference(run.workspace, run.run_id, "prompts", "all")
    with disable_run_logger():
        return align_round.fn(prompts, with_settings(run.config, SETTINGS), BASE, 1, processes)


def dying(train: Any, after: int, *arguments: Any, **options: Any) -> Iterator[StepRecord]:
    for record in train(*arguments, **options):
        yield record
        if record.step == after:
            raise KeyboardInterrupt


def test_a_killed_round_goes_on_to_the_same_commit(written_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(written_run)
    rows = read_artifact(whole, "training_steps")
    assert [(row["step"], row["pairs"], row["drawn"]) for row in rows] == [(1, 0, 6), (2, 0, 6)]
    assert all(-1 <= row["reward"] <= 0.5 and row["winner_margin"] is None for row in rows)
    (model,) = read_artifact(whole, "models")
    assert (model["objective"], model["natural_beta"], model["parent_model_id"]) == ("reward", None, BASE)
    digest = artifact_digest(whole)

    for file in whole.folder.rglob("*"):
        if file.is_file():
            file.unlink()
    monkeypatch.setattr(alignment, "train_on_reward", partial(dying, alignment.train_on_reward, 2))
    with pytest.raises(KeyboardInterrupt):
        trained(written_run)
    monkeypatch.undo()
    assert artifact_digest(trained(written_run)) == digest


def test_several_processes_are_refused(written_run: Any) -> None:
    with pytest.raises(InvalidInput, match="in one process"):
        trained(written_run, TrainingProcesses(per_host=2))


def test_a_plan_draws_no_images_for_training(written_run: Any) -> None:
    planned = workload(with_settings(written_run.config, SETTINGS))
    assert {part.group for part in planned.image_sets} == {"validation", "evaluation", "obedience"}
    assert [part.model_id for part in planned.image_sets if part.group == "validation"] == [BASE, "round-1", "round-2"]
