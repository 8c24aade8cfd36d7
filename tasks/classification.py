"""Perceived attributes of one shard of images, by the builder or by the judge."""

from collections import Counter
from collections.abc import Mapping, Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES
from popalign_core.classification import Attribution, AxisProbabilities, Status
from popalign_core.config import RunConfig
from popalign_core.detection import WHOLE, View, label_views
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import pick_device
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.phrases import described
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.events import announce_commit
from tasks.progress import progress_of
from tasks.run import classifier_of, passes, reference, timed
from tasks.sampling import asked_for
from tasks.stored_shard import SEEN_BY_BOTH, StoredShard


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
    """Commits `attributes` of a shard: one row an image and axis. ref: as `attributes_of` gives it.

    With a detector also `region_attributes`, one row a face or person and axis.
    """
    if is_committed(ref):
        return ref
    key, role = ref.key.rsplit(".", 1)
    samples = reference(ref.workspace, ref.run_id, "samples", key)
    axes = [AXES[name] for name in config.expansion.axes]
    shard = StoredShard(samples, config)
    classifier = classifier_of(role, config.classification, config.device)
    model_id, purpose, _ = samples.key.rsplit(".", 2)
    work = f"classification {model_id} {asked_for(purpose)} {role}"
    if role == "builder":
        shard.embed_where_nobody_is_at_it()  # before the clock starts, since it is timed as a stage of its own
    with timed(ref, "classification", pick_device(config.device).type) as facts, progress_of(work) as advance:
        if isinstance(classifier, ZeroShotClassifier):
            views = shard.views(whole=True)
            outcomes = classifier.probabilities_of(shard.embeddings.vectors, [described(axis) for axis in axes])
        else:
            views = shard.views(whole=any(axis.whole_scene for axis in axes))
            outcomes = classifier.probabilities(shard.pictures(views), axes)
        commit_labels(ref, shard, views, outcomes, classifier.classifier_id)
        facts["items"] = len(shard.rows)
        advance(len(shard.rows))
    announce_commit(ref, len(shard.rows))
    if role == "judge" and asked_for(purpose) in SEEN_BY_BOTH:
        shard.embed_where_nobody_is_at_it()
    return ref


def commit_labels(
    ref: ArtifactRef,
    shard: StoredShard,
    views: Sequence[View],
    outcomes: Sequence[AxisProbabilities],
    classifier_id: str,
) -> None:
    """Commits what the probabilities of a shard's views say, by image and by face or person."""
    settings = shard.config
    found = label_views(
        outcomes,
        views,
        shard.found,
        min_confidence=settings.classification.min_confidence,
        rule=settings.detection.several,
    )
    images = [
        _attribute_row(row, label, classifier_id)
        for labels in found
        for row, label in zip(shard.rows, labels.images, strict=True)
    ]
    regions = [
        {**_attribute_row(shard.rows[view.image], label, classifier_id), "region": view.region}
        for labels in found
        for view, label in zip(views, labels.views, strict=True)
        if view.region != WHOLE
    ]
    with staged_artifact(ref) as folder:
        write_rows(folder, "attributes", images)
        if shard.found is not None:
            write_rows(folder, "region_attributes", regions)


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
