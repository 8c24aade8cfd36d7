"""What makes sampling faster and changes the images: weights in 8 bits, and a UNet whose inner part steps share."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

from popalign_core.errors import InvalidInput

if TYPE_CHECKING:
    from popalign_core.models.text_to_image import TextToImageModel

_CACHE = "popalign_inner_cache"
_ALL_TIMESTEPS = (-1, 1_000_000)


def store_in_fp8(unet: UNet2DConditionModel, compute_dtype: torch.dtype) -> None:
    """Keeps the weights as float8 (e4m3) and computes in the given type; normalisation layers and adapters stay.

    There is no way back: the rounding is done. Saves memory and no time, since every layer is cast for each call.
    """
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)


@contextmanager
def inner_cache(model: "TextToImageModel", every: int) -> Generator[None]:
    """Inside, all but the outermost level of the UNet is computed in every so many calls, and reused between.

    Begins with a computed call: enter it anew for each batch. every: 1 = no cache.
    Raises: InvalidInput for a model without inner levels.
    Source: Ma et al. 2023, "DeepCache" (uniform, shallowest branch), by the hook of diffusers' pyramid attention
    broadcast on whole blocks.
    """
    if every == 1:
        yield
        return
    registries = [HookRegistry.check_if_exists_or_initialize(block) for block in _inner_blocks(model)]
    for registry in registries:
        registry.register_hook(PyramidAttentionBroadcastHook(_ALL_TIMESTEPS, every, lambda: 0), _CACHE)
    try:
        yield
    finally:
        for registry in registries:
            registry.remove_hook(_CACHE, recurse=False)


def _inner_blocks(model: "TextToImageModel") -> list[torch.nn.Module]:
    denoiser = getattr(model.pipeline, "unet", None)
    down, middle, up = (getattr(denoiser, name, None) for name in ("down_blocks", "mid_block", "up_blocks"))
    if not down or not up or len(down) < 2 or middle is None:
        raise InvalidInput(
            "sampling.approximate.cache_every shares the inner levels of a UNet between steps, and "
            f"{model.source.pipeline} has none: leave it at 1."
        )
    return [*down[1:], middle, *up[:-1]]
