"""Images as the trainer reads them: the moments of their latents, as many at once as fit the memory."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from popalign_core.devices import device_name
from popalign_core.out_of_memory import is_out_of_memory
from popalign_core.tensor_arrays import as_array

if TYPE_CHECKING:
    from popalign_core.models.text_to_image import TextToImageModel

# For one image of 1024 pixels a side SDXL's VAE takes 2.5 GiB in float32.
ENCODE_BATCH, ENCODE_PIXELS = 64, 2 * 1024**2


def encode_batch(side: int) -> int:
    """Images of so many pixels a side that the VAE encodes at once, unless memory does not suffice."""
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // side**2))


def encode_named(
    model: "TextToImageModel", images: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each image's name, and mean and deviation of its latents, (c, h, w), as `encode_images` has them, in order.

    images: names, and uint8 (h, w, 3) of one size. Every batch has one shape: the last is padded by repeating its last
    image, so that moments do not depend on the neighbours; another batch size changes them by rounding only. Where the
    memory does not suffice, the batch is halved for the rest. Raises: what the device says where one does not fit.
    """
    coming = iter(images)
    waiting = list(islice(coming, 1))
    size = encode_batch(max(waiting[0][1].shape[:2])) if waiting else 1
    waiting += islice(coming, size - 1)
    while waiting:
        batch = waiting[:size]
        padded = batch + [batch[-1]] * (size - len(batch))
        moments = _encoded(model, [image for _, image in padded])
        if moments is None:  # outside the handler, whose exception holds the activations
            size //= 2
            torch.cuda.empty_cache()
            continue
        for (name, _), *each in zip(batch, *moments, strict=False):
            yield name, (each[0], each[1])
        waiting = waiting[size:]
        waiting += islice(coming, max(0, size - len(waiting)))


def _encoded(model: "TextToImageModel", images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor] | None:
    """None where the memory does not suffice and less may help."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    try:
        return model.encode_images(pixels)
    except RuntimeError as error:
        if len(images) == 1 or not is_out_of_memory(error):
            raise
    return None


def vae_digest(model: "TextToImageModel") -> str:
    """Names what moves an image's latents (16 hex digits): the VAE's weights and configuration, device and versions."""
    vae = model.pipeline.vae
    surroundings = {name: version(name) for name in ("torch", "diffusers")} | {"device": device_name(model.device)}
    described = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(repr((sorted(surroundings.items()), sorted(described.items()))).encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(as_array(weight).tobytes())
    return digest.hexdigest()[:16]
