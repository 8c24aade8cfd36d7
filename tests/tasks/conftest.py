"""Runs whose images and labels are written down, so that what a task makes of them is known."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from prefect.logging import disable_run_logger

from popalign_core.classification import Status
from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.images import FORMAT, encode_image
from storage.tables import read_artifact, write_rows
from tasks.classification import attributes_of
from tasks.expansion import write_prompts
from tasks.sampling import plan_shards, planned_requests

AXIS = "perceived_gender"
SETTINGS = {
    "device": "cpu",
    "expansion.axes": AXIS,
    "expansion.max_subjects": "2",
    "sampling.steps": "2",
    "sampling.batch_size": "8",
    "sampling.shard_size": "64",
    "images.train_neutral": "10",
    "images.validation": "8",
    "populations.overshoot": "0",
    "images.evaluation": "8",
    "images.trained": "0",
    "images.obedience": "2",
    "assessment.resamples": "200",
}


@dataclass(frozen=True)
class WrittenRun:
    """A run in a workspace of its own, with its prompts committed."""

    workspace: str
    run_id: str
    config: RunConfig

    def commit_samples(self, model_id: str, purpose: str, fingerprint: str = "") -> ArtifactRef:
        """Pictures of noise in the place of a purpose's only shard, the same for every model."""
        (ref,) = plan_shards(self.workspace, self.run_id, self.config, model_id, purpose)
        requests = planned_requests(self.workspace, self.run_id, self.config, model_id, purpose)
        rows = [
            {
                "run_id": self.run_id,
                "model_id": model_id,
                "prompt_id": request.prompt_id,
                "sample_index": request.index,
                "sample_id": request.sample_id,
                "seed": request.seed,
                "width": 64,
                "height": 64,
                "image_sha256": "",
                "sampler_fingerprint": fingerprint,
            }
            for request in requests
        ]
        pictures = [np.random.default_rng(request.seed).integers(0, 256, (64, 64, 3), np.uint8) for request in requests]
        images = [
            {"sample_id": request.sample_id, "image": encode_image(picture), "format": FORMAT}
            for request, picture in zip(requests, pictures, strict=True)
        ]
        with staged_artifact(ref) as folder:
            write_rows(folder, "samples", rows)
            write_rows(folder, "images", images)
        return ref

    def commit_labels(self, samples: ArtifactRef, role: str, label: Callable[[dict], str | None]) -> None:
        """What a classifier would have said of each committed sample; None is a low confidence."""
        rows = [
            {
                "run_id": self.run_id,
                "model_id": row["model_id"],
                "sample_id": row["sample_id"],
                "prompt_id": row["prompt_id"],
                "classifier_id": "written down",
                "axis": AXIS,
                "label": label(row) or "man",
                "confidence": 0.9 if label(row) else 0.5,
                "probabilities": [0.5, 0.5],
                "status": str(Status.OK if label(row) else Status.LOW_CONFIDENCE),
            }
            for row in read_artifact(samples, "samples")
        ]
        with staged_artifact(attributes_of(samples, role)) as folder:
            write_rows(folder, "attributes", rows)


@pytest.fixture
def written_run(tmp_path: Path) -> WrittenRun:
    """With the prompts of two subjects a split."""
    run = WrittenRun(str(tmp_path), "written", with_settings(preset("emoji"), SETTINGS))
    with disable_run_logger():
        write_prompts.fn(run.workspace, run.run_id, run.config.expansion)
    return run
