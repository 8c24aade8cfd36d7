"""A further axis for a run's images, from what the builder's model saw in them: no image is needed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.disparity_rows import measure_disparities
from popalign_core.assessment.uncertainty import wilson_interval
from popalign_core.attributes import AXES
from popalign_core.classification import Status
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.phrases import DescribedAxis
from popalign_core.population_counts import group_counts
from storage.artifacts import ArtifactRef, committed_keys, is_committed
from storage.errors import NotCommitted
from storage.layout import Workspace
from storage.tables import read_artifact
from tasks.classification import attributes_of, commit_labels
from tasks.run import builder, reference
from tasks.stored_shard import StoredShard

MEASURED = "evaluation"


@dataclass(frozen=True)
class AxisMeasured:
    """An axis on held-out neutral prompts. disparities, shares: one row a model, ready to show."""

    classifier_id: str
    shards: int
    disparities: tuple[tuple[str, ...], ...]
    shares: tuple[tuple[str, ...], ...]


def classify_by_embeddings(samples: ArtifactRef, config: RunConfig, axis: DescribedAxis) -> ArtifactRef:
    """Commits `attributes` of a shard on one more axis, as `classify_shard` would from the images.

    Raises: InvalidInput if the vectors are of another model than the run's builder.
    """
    ref = attributes_of(samples, f"builder.{axis.axis.name}-{axis.digest}")
    if is_committed(ref):
        return ref
    shard = StoredShard(samples, config)
    seen = builder(config.classification, config.device)
    outcomes = seen.probabilities_of(shard.embeddings.vectors, [axis])
    commit_labels(ref, shard, shard.views(whole=True), outcomes, named_classifier(seen.classifier_id, axis))
    return ref


def named_classifier(classifier_id: str, axis: DescribedAxis) -> str:
    """The id in the rows: other phrases for an axis that a user defined are another classifier."""
    return classifier_id if axis.axis.name in AXES else f"{classifier_id}+{axis.digest}"


def add_axis(workspace: str, run_id: str, config: RunConfig, axis: DescribedAxis) -> AxisMeasured:
    """Classifies all images of a run that have vectors on one more axis, and measures held-out ones.

    Raises: InvalidInput if the run has the axis already; NotCommitted if it has no vectors.
    """
    if axis.axis.name in config.expansion.axes:
        raise InvalidInput(f"run {run_id} was made with {axis.axis.name}: its images are classified on it already.")
    place = Workspace.open(workspace)
    keys = [ref.key for ref in committed_keys(place, run_id, "embeddings")]
    if not keys:
        raise NotCommitted(f"run {run_id} in {place.root} has no embeddings yet: classify its images first.")
    samples = [reference(workspace, run_id, "samples", key) for key in keys]
    refs = [classify_by_embeddings(shard, config, axis) for shard in samples]
    measured = list(_by_model(refs))
    seen = builder(config.classification, config.device)
    return AxisMeasured(
        named_classifier(seen.classifier_id, axis),
        len(refs),
        tuple(_disparity_row(model, counts, axis, config) for model, counts in measured),
        tuple(row for model, counts in measured for row in _share_rows(model, counts, axis)),
    )


Counts = dict[str, list[str | None]]


def _by_model(refs: list[ArtifactRef]) -> Iterator[tuple[str, Counts]]:
    """Labels of held-out images by prompt, for every model that has drawn any."""
    models: dict[str, Counts] = defaultdict(lambda: defaultdict(list))
    for ref in refs:
        model_id, purpose, _ = ref.key.split(".", 2)
        if purpose == MEASURED:
            for row in read_artifact(ref, "attributes"):
                known = row["label"] if row["status"] == Status.OK else None
                models[model_id][row["prompt_id"]].append(known)
    yield from sorted(models.items())


def _disparity_row(model: str, labels: Counts, axis: DescribedAxis, config: RunConfig) -> tuple[str, ...]:
    counts = {prompt: group_counts(own, axis.axis) for prompt, own in labels.items()}
    rows = measure_disparities(
        counts, axis.axis, axis.axis.uniform(), seed=config.seed, resamples=config.assessment.resamples
    )
    mean = next(row for row in rows if row.level == "mean" and row.measure == "l2")
    floor = "" if mean.floor is None else f"{mean.floor:.3f}"
    return model, f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]", floor, str(mean.n), str(mean.unknown)


def _share_rows(model: str, labels: Counts, axis: DescribedAxis) -> Iterator[tuple[str, ...]]:
    counts = np.sum([group_counts(own, axis.axis)[0] for own in labels.values()], axis=0)
    n = int(counts.sum())
    for group, count in zip(axis.axis.groups, counts.tolist(), strict=True):
        low, high = wilson_interval(count, n)
        share = f"{100 * count / n:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" if n else "no image"
        yield model, group, str(count), share
