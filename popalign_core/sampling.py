"""Images from prompts, exactly reproducible: a seed an image, one batch shape, neighbours without influence."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from popalign_core.errors import InvalidInput

if TYPE_CHECKING:
    from popalign_core.models.sdxl import DtypeName, PromptEmbeddings, SchedulerName, SdxlModel

AttentionName = Literal["default", "cudnn", "flash", "efficient", "math"]
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn. height, width in pixels, 0 = the model's own size; batch_size images in one fixed shape.

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
    attention: AttentionName
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


@dataclass(frozen=True)
class SampledImage:
    """pixels: uint8 (h, w, 3). batch_size: of the batch that it was drawn in."""

    request: ImageRequest
    pixels: np.ndarray
    batch_size: int


def sampler_fingerprint(model: "SdxlModel", settings: SamplingSettings) -> str:
    """Names everything that can move a pixel: weights, settings, device kind and library versions (16 hex digits)."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    facts = {"model": model.source.digest(), "device": model.device.type, **asdict(settings), **libraries}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def sample_images(
    model: "SdxlModel", requests: Sequence[ImageRequest], settings: SamplingSettings
) -> Iterator[list[SampledImage]]:
    """Draws the requests batch by batch, across prompts.

    Every batch has the same shape: the last one is padded by repeating its last request, and the padding is dropped.
    An image is then bit-identical whatever its neighbours, its shard or a resume (per device and library version);
    another batch size changes it by rounding only. Where the accelerator's memory does not suffice, the batch is halved
    for the rest of the requests. Raises: torch.OutOfMemoryError where one image does not fit.
    """
    from popalign_core.models.sdxl import set_scheduler

    height, width = settings.height or model.native_size, settings.width or model.native_size
    model.check_size(height, width)
    set_scheduler(model, settings.scheduler)
    texts = list(dict.fromkeys(request.text for request in requests))
    position = {text: row for row, text in enumerate(texts)}
    embeddings = model.encode_prompts(texts) if texts else None
    empty = model.encode_unconditional() if settings.guidance_scale > 1 else None
    start, size = 0, settings.batch_size
    while start < len(requests):
        batch = list(requests[start : start + size])
        padded = batch + [batch[-1]] * (size - len(batch))
        assert embeddings is not None  # there are requests
        rows = embeddings.rows([position[request.text] for request in padded])
        try:
            pixels = _draw_batch(model, rows, empty, [request.seed for request in padded], settings, (height, width))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            pixels = None
        if pixels is None:  # outside the handler, whose exception holds the activations
            size //= 2
            torch.cuda.empty_cache()
            continue
        start += len(batch)
        yield [SampledImage(request, image, size) for request, image in zip(batch, pixels, strict=False)]


def _draw_batch(
    model: "SdxlModel",
    rows: "PromptEmbeddings",
    empty: "PromptEmbeddings | None",
    seeds: Sequence[int],
    settings: SamplingSettings,
    size: tuple[int, int],
) -> np.ndarray:
    from popalign_core.models.approximate import inner_cache

    count = len(seeds)
    # CPU generators: the same initial noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative = {}
    if empty is not None:
        negative = {
            "negative_prompt_embeds": empty.context.expand(count, -1, -1).to(model.device),
            "negative_pooled_prompt_embeds": empty.pooled.expand(count, -1).to(model.device),
        }
    with torch.inference_mode(), attention_backend(settings.attention), inner_cache(model, settings.cache_every):
        images: np.ndarray = model.pipeline(
            prompt_embeds=rows.context.to(model.device),
            pooled_prompt_embeds=rows.pooled.to(model.device),
            **negative,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            height=size[0],
            width=size[1],
            output_type="np",
        ).images
    if not np.isfinite(images).all():
        raise InvalidInput(
            f"the model drew pixels that are no numbers in {settings.dtype}; "
            "use sampling.dtype bfloat16 or float32, or a VAE made for float16."
        )
    return np.round(images * 255).astype(np.uint8)


def attention_backend(name: AttentionName) -> AbstractContextManager[object]:
    """The attention kernel to use; "default" leaves the choice to torch."""
    if name == "default":
        return nullcontext()
    return cast("AbstractContextManager[object]", sdpa_kernel([ATTENTION[name], SDPBackend.MATH], set_priority=True))
