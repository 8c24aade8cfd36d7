"""Images as lossless WebP bytes."""

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from storage.errors import CorruptArtifact, SchemaMismatch

FORMAT = "webp"


def encode_image(pixels: np.ndarray) -> bytes:
    """Lossless WebP of uint8 (h, w, 3). Raises: SchemaMismatch for any other array."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise SchemaMismatch(f"an image must be uint8 of shape (h, w, 3), not {pixels.dtype} of shape {pixels.shape}.")
    stream = io.BytesIO()
    # exact keeps the colour of transparent pixels; method 0 is six times faster and a little larger.
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True, quality=0, method=0, exact=True)
    return stream.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """Pixels as uint8 (h, w, 3). Raises: CorruptArtifact if the bytes are no image."""
    try:
        with Image.open(io.BytesIO(data), formats=(FORMAT,)) as image:
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptArtifact(
            f"{len(data)} stored bytes are not an image ({type(error).__name__}); remove the `samples` folder that "
            "holds them and run again with the same run id."
        ) from error


def decode_images(stored: Sequence[bytes]) -> np.ndarray:
    """Pixels of images of one size, uint8 (n, h, w, 3), decoded in threads. Raises: CorruptArtifact."""
    threads = min(16, os.cpu_count() or 1)
    # Small images take less time than handing one over to a thread: a few at a time, and still enough pieces for all.
    size = max(1, min(8, len(stored) // (4 * threads)))
    pieces = [stored[start : start + size] for start in range(0, len(stored), size)]
    with ThreadPoolExecutor(threads) as pool:
        return np.stack([pixels for piece in pool.map(_decoded, pieces) for pixels in piece])


def _decoded(stored: Sequence[bytes]) -> list[np.ndarray]:
    return [decode_image(data) for data in stored]
