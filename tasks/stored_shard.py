"""One shard of images as the classifiers need it: who is in them, and what the builder's model sees in them.

Both are committed when they are first made, and read ever after.
"""

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from popalign_core.config import RunConfig
from popalign_core.detection import Box, Detector, Found, Kind, View, cut, detect, views_of
from popalign_core.errors import InvalidInput
from popalign_core.models.zero_shot import ZeroShotClassifier
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.embeddings import Embeddings, read_embeddings, write_embeddings
from storage.images import decode_images
from storage.locks import claimed
from storage.tables import Row, read_artifact, write_rows
from tasks.run import builder, detector, reference, timed

KINDS: tuple[Kind, ...] = ("person", "face")
# Whose images the judge labels and the builder's model looks at as well, for quality, diversity and agreement.
SEEN_BY_BOTH = ("evaluation", "trained")


def embeddings_of(samples: ArtifactRef) -> ArtifactRef:
    """Where the builder's vectors of a shard of samples lie."""
    return reference(samples.workspace, samples.run_id, "embeddings", samples.key)


class StoredShard:
    """samples: committed. Images are decoded when they are first needed, if ever."""

    def __init__(self, samples: ArtifactRef, config: RunConfig):
        self.samples, self.config = samples, config
        self.rows: Sequence[Row] = read_artifact(samples, "samples")
        self.sample_ids = [str(row["sample_id"]) for row in self.rows]

    @cached_property
    def images(self) -> np.ndarray:
        """uint8 (n, h, w, 3), in the order of the rows. Raises: RemovedArtifact, CorruptArtifact."""
        stored = {row["sample_id"]: row["image"] for row in read_artifact(self.samples, "images")}
        return decode_images([stored[sample_id] for sample_id in self.sample_ids])

    @cached_property
    def found(self) -> list[Found] | None:
        """Persons and faces of every image; None where nobody is looked for."""
        if not self.config.detection.on:
            return None
        ref = reference(self.samples.workspace, self.samples.run_id, "detections", self.samples.key)
        if not is_committed(ref):
            self._commit_detections(ref)
        boxes: dict[tuple[str, str], list[Box]] = defaultdict(list)
        for row in read_artifact(ref, "detections"):
            box = Box(row["left"], row["top"], row["right"], row["bottom"], row["confidence"])
            boxes[row["sample_id"], row["kind"]].append(box)
        wanted = self._sources()

        def of(sample_id: str, kind: Kind) -> tuple[Box, ...] | None:
            return tuple(boxes[sample_id, kind]) if kind in wanted else None

        return [Found(of(sample_id, "person"), of(sample_id, "face")) for sample_id in self.sample_ids]

    def views(self, *, whole: bool) -> list[View]:
        """What is classified of the images."""
        return views_of(len(self.rows), self.found, whole=whole)

    def pictures(self, views: Sequence[View]) -> np.ndarray | list[np.ndarray]:
        """The pixels of the views."""
        if self.found is None:
            return self.images
        return cut(self.images, views, self.found, self.config.detection.margin)

    @cached_property
    def embeddings(self) -> Embeddings:
        """What the builder's model sees in whole images, and in the boxes if there are any.

        Raises: InvalidInput if another model made them.
        """
        ref = embeddings_of(self.samples)
        seen = builder(self.config.classification, self.config.device)
        if not is_committed(ref):
            self._commit_embeddings(ref, seen)
        found = read_embeddings(ref)
        if found.embedder_id != seen.classifier_id:
            raise InvalidInput(
                f"the vectors of {self.samples.key} are of {found.embedder_id}, and the builder is now "
                f"{seen.classifier_id}: put the model that the run was made with back in its place."
            )
        return found

    def embed_where_nobody_is_at_it(self) -> None:
        """Commits the vectors while images are decoded, unless they are there or another process is making them."""
        ref = embeddings_of(self.samples)
        with claimed(ref) as mine:
            if mine:
                self._commit_embeddings(ref, builder(self.config.classification, self.config.device))

    def _commit_embeddings(self, ref: ArtifactRef, seen: ZeroShotClassifier) -> None:
        with timed(ref, "embedding", seen.device.type) as facts:
            views = self.views(whole=True)
            vectors = seen.image_features(self.pictures(views)).numpy()
            ids, regions = [self.sample_ids[view.image] for view in views], [view.region for view in views]
            with staged_artifact(ref) as folder:
                found = Embeddings(seen.classifier_id, ids, regions, vectors)
                write_embeddings(folder, ref.run_id, _model_of(self.samples), found)
            facts["items"] = len(self.rows)

    def _sources(self) -> dict[Kind, str]:
        named = dict(zip(KINDS, (self.config.detection.persons, self.config.detection.faces), strict=True))
        return {kind: source for kind, source in named.items() if source}

    def _commit_detections(self, ref: ArtifactRef) -> None:
        least, device = self.config.detection.min_confidence, self.config.device
        detectors: dict[Kind, Detector] = {
            kind: detector(source, kind, least, device) for kind, source in self._sources().items()
        }
        found = detect(detectors, self.images)
        rows: list[Row] = [
            {
                "run_id": ref.run_id,
                "model_id": _model_of(self.samples),
                "sample_id": sample_id,
                "detector_id": detectors[kind].detector_id,
                "kind": kind,
                "region": region,
                **{name: getattr(box, name) for name in ("left", "top", "right", "bottom", "confidence")},
            }
            for sample_id, own in zip(self.sample_ids, found, strict=True)
            for kind, boxes in zip(KINDS, (own.persons, own.faces), strict=True)
            for region, box in enumerate(boxes or (), start=1)
        ]
        with staged_artifact(ref) as folder:
            write_rows(folder, "detections", rows)


def _model_of(samples: ArtifactRef) -> str:
    return samples.key.rsplit(".", 2)[0]
