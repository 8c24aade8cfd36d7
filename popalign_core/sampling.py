"""Images from prompts, exactly reproducible: a seed an image, one batch shape, neighbours without influence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from popalign_core.acceleration import DEFAULT, Acceleration

if TYPE_CHECKING:
    from popalign_core.models.attention import AttentionName
    from popalign_core.models.denoising import Denoising
    from popalign_core.models.prompt_embeddings import PromptEmbeddings
    from popalign_core.models.sdxl import DtypeName, SchedulerName
    from popalign_core.models.text_to_image import TextToImageModel


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
    """

    request: ImageRequest
    pixels: np.ndarray
    batch_size: int
    latents: torch.Tensor


def sample_images(
    model: "TextToImageModel", requests: Sequence[ImageRequest], settings: SamplingSettings
) -> Iterator[list[SampledImage]]:
    """Draws the requests batch by batch, across prompts.

    Every batch has the same shape: the last one is padded by repeating its last request, and the padding is dropped.
    An image is then bit-identical whatever its neighbours, its shard or a resume (per device and library version);
    another batch size changes it by rounding only. Where the accelerator's memory does not suffice, the batch is halved
    for the rest of the requests. Raises: torch.OutOfMemoryError where one image does not fit.
    """
    denoising = prepared(model, settings)
    start, size = 0, settings.batch_size
    while start < len(requests):
        batch = list(requests[start : start + size])
        padded = batch + [batch[-1]] * (size - len(batch))
        rows = model.prompts.encode([request.text for request in padded])
        try:
            pixels, latents = _draw_batch(denoising, rows, [request.seed for request in padded], settings)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            pixels = latents = None
        if pixels is None or latents is None:  # outside the handler, whose exception holds the activations
            size //= 2
            denoising = prepared(model, settings)
            torch.cuda.empty_cache()
            continue
        start += len(batch)
        parts = zip(batch, pixels, latents, strict=False)
        yield [SampledImage(request, image, size, latent) for request, image, latent in parts]


def prepared(model: "TextToImageModel", settings: SamplingSettings) -> "Denoising":
    """The model, ready to draw by these settings. Weights in 8 bits and distilled ones come with the model.

    Raises: InvalidInput.
    """
    from popalign_core.models.attention import used_kernel
    from popalign_core.models.denoising import Denoising, Trajectory

    used_kernel(model.network, settings.attention)
    height, width = settings.height or model.native_size, settings.width or model.native_size
    trajectory = Trajectory(settings.scheduler, settings.steps, settings.guidance_scale, height, width)
    return Denoising(model, trajectory, settings.acceleration)


def _draw_batch(
    denoising: "Denoising", rows: "PromptEmbeddings", seeds: Sequence[int], settings: SamplingSettings
) -> tuple[np.ndarray, torch.Tensor]:
    from popalign_core.models.approximate import inner_cache
    from popalign_core.models.attention import attention_backend

    with torch.inference_mode(), attention_backend(settings.attention):
        with inner_cache(denoising.model, settings.cache_every):
            latents = denoising.denoise(rows, seeds)
        return denoising.decode(latents), latents.cpu()
