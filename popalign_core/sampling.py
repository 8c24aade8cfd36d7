"""Images from prompts, exactly reproducible: a seed an image, one batch shape, neighbours without influence."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from popalign_core.acceleration import DEFAULT, Acceleration
from popalign_core.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from popalign_core.models.attention import AttentionName
    from popalign_core.models.denoising import Denoising
    from popalign_core.models.prompt_embeddings import PromptEmbeddings
    from popalign_core.models.sdxl import DtypeName, SchedulerName
    from popalign_core.models.text_to_image import TextToImageModel

Result = TypeVar("Result")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. height, width in pixels, 0 = the model's own size; batch_size images in one fixed shape.

    All of it is part of the sampler's fingerprint (`sampler_facts`); so is any field that is added.
    Approximate: cache_every, the inner part of the UNet is computed each so many steps, 1 = each; fp8_weights and
    distilled_lora (its digest) name what `ModelSource` was loaded with.
    """

    scheduler: "SchedulerName"
    steps: int
    guidance_scale: float
    height: int
    width: int
    batch_size: int
    dtype: "DtypeName"
    attention: "AttentionName"
    acceleration: Acceleration = DEFAULT
    cache_every: int = 1
    fp8_weights: bool = False
    distilled_lora: str = ""

    def size(self, model: "TextToImageModel") -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.height or model.native_size, self.width or model.native_size

    def decoded_at_once(self, model: "TextToImageModel") -> int:
        """Latents given to the VAE at once."""
        return self.acceleration.decoded_at_once(self.batch_size, model.device.type, *self.size(model))

    def decoding(self, at_once: int) -> "SamplingSettings":
        """The same, with another number of latents given to the VAE at once; 0 = auto."""
        return replace(self, acceleration=replace(self.acceleration, vae_batch=at_once))


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw. seed: from identity (see `seeds`), so the same for any batch, shard or resume."""

    sample_id: str
    prompt_id: str
    text: str
    index: int
    seed: int


@dataclass(frozen=True, eq=False)
class SampledImage:
    """pixels: uint8 (h, w, 3). batch_size: of the batch that it was drawn in.

    latents: (c, h, w), on the CPU in the model's dtype: what the pixels were decoded from, scaled as the UNet knows it.
    vae_batch: how many were decoded at once, 0 = as the settings say.
    """

    request: ImageRequest
    pixels: np.ndarray
    batch_size: int
    latents: torch.Tensor
    vae_batch: int = 0


def sample_images(
    model: "TextToImageModel", requests: Sequence[ImageRequest], settings: SamplingSettings
) -> Iterator[list[SampledImage]]:
    """Draws the requests batch by batch, across prompts.

    Every batch has the same shape: the last one is padded by repeating its last request, and the padding is dropped.
    An image is then bit-identical whatever its neighbours, its shard or a resume (per device and library version);
    another batch size changes it by rounding only. Where memory does not suffice, what failed is halved for the rest of
    the requests: the batch, or the latents decoded at once, for which nothing is denoised again.
    Raises: torch.OutOfMemoryError, or what else `is_out_of_memory`, where one image does not fit.
    """
    denoising = prepared(model, settings)
    start, size = 0, settings.batch_size
    at_once = denoising.decoded_at_once(size)
    while start < len(requests):
        batch = list(requests[start : start + size])
        padded = batch + [batch[-1]] * (size - len(batch))
        rows, seeds = model.prompts.encode([request.text for request in padded]), [request.seed for request in padded]
        pixels, latents = None, _fitting(partial(_denoised, denoising, rows, seeds, settings), last=size == 1)
        while latents is not None and pixels is None and at_once:
            decoding = partial(_decoded, denoising, latents, at_once, settings)
            pixels = _fitting(decoding, last=size == at_once == 1)
            at_once = at_once if pixels is not None else at_once // 2
        if pixels is None or latents is None:
            size //= 2
            denoising = prepared(model, settings)
            at_once = denoising.decoded_at_once(size)
            continue
        start += len(batch)
        parts = zip(batch, pixels, latents.cpu(), strict=False)
        yield [SampledImage(request, image, size, latent, at_once) for request, image, latent in parts]


def _fitting(work: Callable[[], Result], *, last: bool) -> Result | None:
    """What the work returns, or None where memory did not suffice for it. last: then it is raised."""
    try:
        return work()
    except RuntimeError as error:
        if last or not is_out_of_memory(error):
            raise
    # Outside the handler, whose exception holds the activations.
    torch.cuda.empty_cache()
    return None


def prepared(model: "TextToImageModel", settings: SamplingSettings) -> "Denoising":
    """The model, ready to draw by these settings. Weights in 8 bits and distilled ones come with the model.

    Raises: InvalidInput.
    """
    from popalign_core.models.attention import used_kernel
    from popalign_core.models.denoising import Denoising, Trajectory

    used_kernel(model.network, settings.attention)
    trajectory = Trajectory(settings.scheduler, settings.steps, settings.guidance_scale, *settings.size(model))
    return Denoising(model, trajectory, settings.acceleration, settings.attention)


def _denoised(
    denoising: "Denoising", rows: "PromptEmbeddings", seeds: Sequence[int], settings: SamplingSettings
) -> torch.Tensor:
    from popalign_core.models.approximate import inner_cache
    from popalign_core.models.attention import attention_backend

    with (
        torch.inference_mode(),
        attention_backend(settings.attention),
        inner_cache(denoising.model, settings.cache_every),
    ):
        return denoising.denoise(rows, seeds)


def _decoded(denoising: "Denoising", latents: torch.Tensor, at_once: int, settings: SamplingSettings) -> np.ndarray:
    from popalign_core.models.attention import attention_backend

    with torch.inference_mode(), attention_backend(settings.attention):
        return denoising.decode(latents, at_once)
