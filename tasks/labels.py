"""Committed attributes as the labelled samples that core works on."""

from collections.abc import Sequence

from popalign_core.classification import Status
from popalign_core.config import RunConfig
from popalign_core.population_counts import LabelledSample
from storage.artifacts import ArtifactRef
from storage.tables import read_artifact
from tasks.classification import attributes_of
from tasks.sampling import plan_shards


def labelled_samples(
    workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str, role: str
) -> list[LabelledSample]:
    """Every image of a purpose with its perceived cell; None on an axis where the status is not ok."""
    samples: list[LabelledSample] = []
    for shard in plan_shards(workspace, run_id, config, model_id, purpose):
        cells = _cells(attributes_of(shard, role), config.expansion.axes)
        for row in read_artifact(shard, "samples"):
            cell = cells[row["sample_id"]]
            samples.append(LabelledSample(row["sample_id"], row["prompt_id"], row["sample_index"], cell))
    return samples


def _cells(attributes: ArtifactRef, axes: Sequence[str]) -> dict[str, tuple[str | None, ...]]:
    found: dict[str, dict[str, str | None]] = {}
    for row in read_artifact(attributes, "attributes"):
        known = row["label"] if row["status"] == Status.OK else None
        found.setdefault(row["sample_id"], {})[row["axis"]] = known
    return {sample: tuple(labels[axis] for axis in axes) for sample, labels in found.items()}
