"""Latents of the images that a run trains on, encoded once a run and read ever after."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from popalign_core.alignment.cache import WHOLE, Share
from popalign_core.models.image_latents import encode_named, vae_digest
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.tensor_arrays import as_array
from storage.artifacts import ArtifactRef
from storage.errors import NotCommitted
from storage.image_latents import kept_latents, read_latents, write_latents
from storage.images import decode_images
from storage.layout import Workspace
from storage.tables import read_rows, stream_images

DECODED_AT_ONCE = 32
Moments = tuple[torch.Tensor, ...]


class ImageLatents:
    """Of samples of a run, by a model's VAE."""

    def __init__(self, source: ArtifactRef, model: TextToImageModel, samples: Sequence[str]):
        """source: any artifact of the run."""
        self._workspace, self._run_id = Workspace(Path(source.workspace)), source.run_id
        self._model, self._vae, self._samples = model, vae_digest(model), samples
        columns, wanted = ["sample_id", "image_sha256"], {"sample_id": list(samples)}
        rows = read_rows(self._workspace, self._run_id, "samples", columns=columns, equal=wanted)
        self._hashes = {row["sample_id"]: row["image_sha256"] for row in rows if row["image_sha256"]}

    def encode(self, share: Share = WHOLE) -> None:
        """Encodes this process's share of what is not kept yet, and keeps it."""
        there = kept_latents(self._workspace, self._run_id, self._vae)
        mine = self._samples[share.rank :: share.processes]
        for _ in self._encoded([name for name in mine if (of := self._hashes.get(name)) and of not in there]):
            pass

    def all(self) -> Iterator[tuple[str, Moments]]:
        """Sample, and mean and deviation of its latents, in no order; what is not kept is encoded.

        Raises: NotCommitted where an image is not there.
        """
        missing: list[str] = []
        for name in self._samples:
            kept = self._kept(name)
            if kept is None:
                missing.append(name)
            else:
                yield name, kept
        yield from self._encoded(missing)

    def _kept(self, name: str) -> Moments | None:
        if name not in self._hashes:
            return None
        found = read_latents(self._workspace, self._run_id, self._vae, self._hashes[name])
        return None if found is None else tuple(torch.from_numpy(part) for part in found)

    def _encoded(self, samples: Sequence[str]) -> Iterator[tuple[str, Moments]]:
        """Encodes samples, and keeps what has a hash to be known by."""
        absent = set(samples)
        for name, (mean, deviation) in encode_named(self._model, self._pixels(samples)):
            absent.discard(name)
            if name in self._hashes:
                kept = as_array(mean), as_array(deviation)
                write_latents(self._workspace, self._run_id, self._vae, self._hashes[name], kept)
            yield name, (mean, deviation)
        if absent:
            raise NotCommitted(
                f"{len(absent)} of {len(samples)} images to train on are not in run {self._run_id}, such as "
                f"{min(absent)}: their files were removed. Start the run again under another id."
            )

    def _pixels(self, samples: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Images as they come from the disk, a few at a time."""
        coming = stream_images(self._workspace, self._run_id, samples)
        while batch := list(islice(coming, DECODED_AT_ONCE)):
            pixels = decode_images([stored for _, stored in batch])
            yield from zip((name for name, _ in batch), pixels, strict=True)
