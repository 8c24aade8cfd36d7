"""Perceived attributes of one shard of images, by the builder or by the judge."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES
from popalign_core.classification import Status, attribute
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.images import decode_image
from storage.tables import read_artifact, write_rows
from tasks.progress import progress_of
from tasks.run import classifier_of, passes, reference, timed


class TooManyUnclassified(InvalidInput):
    """The classifier cannot read most of what the base model draws."""


def attributes_of(samples: ArtifactRef, role: str) -> ArtifactRef:
    """Where the attributes of a shard of samples go. role: builder or judge."""
    return reference(samples.workspace, samples.run_id, "attributes", f"{samples.key}.{role}")


def check_classified(shards: Sequence[ArtifactRef], role: str, config: RunConfig) -> None:
    """Stops a run that would be made of too few labels. Raises: TooManyUnclassified."""
    rows = [row for shard in shards for row in read_artifact(attributes_of(shard, role), "attributes")]
    status = Counter((row["axis"], row["status"]) for row in rows)
    for axis in config.expansion.axes:
        images = sum(count for (name, _), count in status.items() if name == axis)
        unknown = images - status[axis, Status.OK]
        if images and unknown / images > config.classification.max_unclassified:
            reasons = ", ".join(f"{count} {kind}" for (name, kind), count in status.items() if name == axis)
            limit = config.classification.max_unclassified
            raise TooManyUnclassified(
                f"{unknown} of {images} images have no known {axis} ({reasons}), more than "
                f"classification.max_unclassified = {limit:g}. "
                "Another classifier, or a lower classification.min_confidence, may read them."
            )


@task(cache_policy=NO_CACHE, retries=1, retry_condition_fn=passes)
def classify_shard(samples: ArtifactRef, role: str, config: RunConfig) -> ArtifactRef:
    """Commits `attributes`: one row an image and axis."""
    ref = attributes_of(samples, role)
    if is_committed(ref):
        return ref
    axes = [AXES[name] for name in config.expansion.axes]
    rows = read_artifact(samples, "samples")
    stored = {row["sample_id"]: row["image"] for row in read_artifact(samples, "images")}
    classifier = classifier_of(role, config.classification, config.device)
    with timed(ref, "classification", config.device) as facts, progress_of(f"classification ({role})") as advance:
        images = np.stack([decode_image(stored[row["sample_id"]]) for row in rows])
        found: list[dict[str, object]] = []
        for outcome in classifier.probabilities(images, axes):
            labels = attribute(outcome, min_confidence=config.classification.min_confidence)
            for row, label in zip(rows, labels, strict=True):
                found.append(
                    {
                        "run_id": ref.run_id,
                        "model_id": row["model_id"],
                        "sample_id": row["sample_id"],
                        "prompt_id": row["prompt_id"],
                        "classifier_id": classifier.classifier_id,
                        "axis": label.axis,
                        "label": label.label,
                        "confidence": label.confidence,
                        "probabilities": list(label.probabilities),
                        "status": str(label.status),
                    }
                )
        facts["items"] = len(rows)
        advance(len(rows))
        with staged_artifact(ref) as folder:
            write_rows(folder, "attributes", found)
    return ref
