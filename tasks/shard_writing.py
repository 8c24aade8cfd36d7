"""A shard's images on their way to the disk, while the next ones are drawn."""

import hashlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from popalign_core.sampling import SampledImage
from popalign_core.tensor_arrays import as_bytes
from storage.images import FORMAT, encode_image
from storage.tables import RowWriter

# Batches that may wait to be compressed: more would only take memory.
MOST_WAITING = 4


class ShardWriter:
    """Compresses images in threads of its own and writes them in their order, in another."""

    def __init__(self, folder: Path, encoders: ThreadPoolExecutor, writer: ThreadPoolExecutor, *, keep_latents: bool):
        """folder: a staged one. writer: of one thread."""
        self._images = RowWriter(folder, "images")
        self._latents = RowWriter(folder, "latents") if keep_latents else None
        self._encoders, self._writer = encoders, writer
        self._waiting: deque[Future[None]] = deque()
        self.hashes: dict[str, str] = {}

    def add(self, batch: Sequence[SampledImage]) -> None:
        """Takes a batch over. Raises: what the writing of an earlier one raised."""
        while self._waiting and (len(self._waiting) >= MOST_WAITING or self._waiting[0].done()):
            self._waiting.popleft().result()
        encoded = [self._encoders.submit(encode_image, drawn.pixels) for drawn in batch]
        self._waiting.append(self._writer.submit(self._write, batch, encoded))

    def close(self) -> None:
        """Waits for all that was added; `hashes` are then those of every image's stored bytes. Raises: as `add`."""
        for written in self._waiting:
            written.result()
        self._images.close()
        if self._latents is not None:
            self._latents.close()

    def _write(self, batch: Sequence[SampledImage], encoded: Sequence[Future[bytes]]) -> None:
        for drawn, future in zip(batch, encoded, strict=True):
            name, data = drawn.request.sample_id, future.result()
            self.hashes[name] = hashlib.sha256(data).hexdigest()
            self._images.add([{"sample_id": name, "image": data, "format": FORMAT}])
        if self._latents is not None:
            self._latents.add(_latents_row(drawn) for drawn in batch)


@contextmanager
def shard_writer(folder: Path, threads: int, *, keep_latents: bool) -> Generator[ShardWriter]:
    """Writes `images`, and `latents` if they are kept, into a staged folder. threads: that compress."""
    encoders, writer = ThreadPoolExecutor(threads, "encoding"), ThreadPoolExecutor(1, "writing")
    try:
        opened = ShardWriter(folder, encoders, writer, keep_latents=keep_latents)
        yield opened
        opened.close()
    finally:
        for pool in (encoders, writer):
            pool.shutdown(cancel_futures=True)


def _latents_row(drawn: SampledImage) -> dict[str, object]:
    return {
        "sample_id": drawn.request.sample_id,
        "latents": as_bytes(drawn.latents),
        "shape": list(drawn.latents.shape),
        "dtype": str(drawn.latents.dtype).removeprefix("torch."),
    }
