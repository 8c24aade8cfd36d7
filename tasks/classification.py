"""Perceived attributes of one shard of images, by the builder or by the judge."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES
from popalign_core.classification import Attribution, Status, attribute
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import pick_device
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.images import decode_image
from storage.tables import read_artifact, write_rows
from tasks.events import announce_commit
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


@task(
    cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 60], retry_jitter_factor=0.5, retry_condition_fn=passes
)
def classify_shard(ref: ArtifactRef, config: RunConfig) -> ArtifactRef:
    """Commits `attributes` of a shard: one row an image and axis. ref: as `attributes_of` gives it."""
    if is_committed(ref):
        return ref
    key, role = ref.key.rsplit(".", 1)
    samples = reference(ref.workspace, ref.run_id, "samples", key)
    axes = [AXES[name] for name in config.expansion.axes]
    rows = read_artifact(samples, "samples")
    stored = {row["sample_id"]: row["image"] for row in read_artifact(samples, "images")}
    classifier = classifier_of(role, config.classification, config.device)
    model_id, purpose, _ = samples.key.rsplit(".", 2)
    work = f"classification {model_id} {purpose} {role}"
    with timed(ref, "classification", pick_device(config.device).type) as facts, progress_of(work) as advance:
        images = np.stack([decode_image(stored[row["sample_id"]]) for row in rows])
        found: list[dict[str, object]] = []
        for outcome in classifier.probabilities(images, axes):
            labels = attribute(outcome, min_confidence=config.classification.min_confidence)
            pairs = zip(rows, labels, strict=True)
            found += [_attribute_row(row, label, classifier.classifier_id) for row, label in pairs]
        facts["items"] = len(rows)
        advance(len(rows))
        with staged_artifact(ref) as folder:
            write_rows(folder, "attributes", found)
    announce_commit(ref, len(rows))
    return ref


def _attribute_row(sample: Mapping[str, object], label: Attribution, classifier_id: str) -> dict[str, object]:
    return {
        **{name: sample[name] for name in ("run_id", "model_id", "sample_id", "prompt_id")},
        "classifier_id": classifier_id,
        "axis": label.axis,
        "label": label.label,
        "confidence": label.confidence,
        "probabilities": list(label.probabilities),
        "status": str(label.status),
    }
