"""Device memory and arithmetic of sampling, by running it on meta tensors: nothing is loaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from popalign_core.acceleration import VaeDtype
from popalign_core.live_memory import Used, count_use
from popalign_core.models.approximate import store_in_fp8
from popalign_core.models.architecture import Architecture, meta_denoiser, meta_vae
from popalign_core.models.attention import UnetAttention, fuse_projections
from popalign_core.models.families import SDXL, STABLE_DIFFUSION_3
from popalign_core.models.lora import Network
from popalign_core.models.sdxl import DTYPES, DtypeName

_TIME_IDS = 6
Parts = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Footprint:
    """parts: (what, bytes) at the moment of the peak, most lasting first.

    flop: of one image, of one pair, or of one update of a policy gradient.
    """

    parts: Parts
    flop: float

    @property
    def bytes(self) -> float:
        """All parts together."""
        return total(self.parts)


def total(parts: Parts) -> float:
    """Bytes of all parts."""
    return sum(size for _, size in parts)


def at_the_peak(moments: Iterable[Parts]) -> Parts:
    """Of the moments that take turns the one that needs the most, without what is empty in it."""
    return tuple((name, float(size)) for name, size in max(moments, key=total) if size)


@dataclass(frozen=True)
class SamplingShape:
    """What decides the memory of drawing a batch of images.

    side: pixels of an image, 0 = the model's own. decoded: images that the VAE decodes at once. passes: calls of the
    denoiser for an image, those of guidance counted. math_attention: the kernel that keeps the whole matrix.
    encoders_stay: on a CPU the text encoders lie in the memory that is counted; on a GPU only while they encode.
    The rest: see `Acceleration` and `ApproximateConfig`.
    """

    side: int
    batch: int
    decoded: int
    dtype: DtypeName
    passes: int
    guided: bool
    vae_dtype: VaeDtype = "model"
    fp8_weights: bool = False
    fused_projections: bool = False
    math_attention: bool = False
    cuda_graphs: bool = False
    encoders_stay: bool = False


@lru_cache(maxsize=64)
def sampling_footprint(model: Architecture, shape: SamplingShape) -> Footprint:
    """Of drawing a batch of images, the most of these moments: loading, encoding prompts, denoising, decoding.

    Prompts are encoded one at a time, and what that takes beside the encoders is not counted; nor is what
    `cache_every` keeps. Upper bounds, where the count is not exact: weights in 8 bits are taken to lie beside the
    widest layer's in the dtype, which is made for its call; a graph keeps all that a call of the denoiser takes.
    Raises: InvalidInput for fused projections of a network that has none.
    """
    number, latents = DTYPES[shape.dtype], model.latent_side(shape.side)
    rows = shape.batch * (2 if shape.guided else 1)
    whole = shape.math_attention
    loaded, step = _denoising(model, latents, rows, number, whole, shape.fused_projections)
    stored, widest = _in_fp8(model, number) if shape.fp8_weights else (loaded, 0.0)
    vae = meta_vae(model, vae_number(model, shape.dtype, shape.vae_dtype))
    decoding = count_decoding(vae, shape.decoded, latents, whole_attention=whole)
    texts = ("text encoders", float(model.text_elements * number.itemsize))
    first = (("VAE", parameter_bytes(vae)), *((texts,) if shape.encoders_stay else ()))
    name = model.denoiser_name
    lasting = ((name, stored), *first)
    graph = (("the CUDA graph's own", float(step.peak_bytes)),) if shape.cuda_graphs else ()
    parts = at_the_peak(
        (
            ((name, loaded), *first),
            ((name, stored), *first[:1], texts),
            (*lasting, (f"activations of the {name}", step.peak_bytes + widest)),
            (*lasting, *graph, ("activations of the VAE", float(decoding.peak_bytes))),
        )
    )
    return Footprint(parts, shape.passes * step.flop / rows + decoding.flop / shape.decoded)


@lru_cache(maxsize=8)
def _denoising(
    model: Architecture, latents: int, rows: int, number: torch.dtype, whole_attention: bool, fused: bool
) -> tuple[float, Used]:
    """Bytes of the denoiser's weights, and a call of it."""
    network = meta_denoiser(model, number).eval().requires_grad_(False)
    if fused:
        fuse_projections(network)
        network.set_attn_processor(UnetAttention(fused=True))
    call = network_call(network, latents, rows)
    with torch.no_grad():
        return parameter_bytes(network), count_use(call, whole_attention=whole_attention)


def _in_fp8(model: Architecture, number: torch.dtype) -> tuple[float, float]:
    """Bytes of the denoiser's weights, and of its widest layer's as it computes."""
    network: Any = meta_denoiser(model, number)
    store_in_fp8(network, number)
    narrow = (
        sum(weight.numel() for weight in layer.parameters(recurse=False) if weight.dtype == torch.float8_e4m3fn)
        for layer in network.modules()
    )
    return parameter_bytes(network), float(max(narrow) * number.itemsize)


def vae_number(model: Architecture, dtype: DtypeName, vae_dtype: VaeDtype = "model") -> torch.dtype:
    """Number format that the VAE is loaded in, by the rule of `load_pipeline`."""
    if vae_dtype != "model":
        return DTYPES[vae_dtype]
    overflows = dtype == "float16" and meta_vae(model, torch.float16).config.force_upcast
    return torch.float32 if overflows else DTYPES[dtype]


def count_decoding(vae: Any, images: int, latents: int, *, whole_attention: bool = False) -> Used:
    """Of decoding images at once. vae: on meta tensors. latents: positions a side."""
    weight = next(vae.parameters())
    inputs = torch.empty(images, vae.config.latent_channels, latents, latents, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        return count_use(lambda: vae.decode(inputs, return_dict=False), whole_attention=whole_attention)


def network_call(network: Network, latents: int, rows: int) -> Callable[[], Tensor]:
    """A call of a UNet or transformer on that many rows, made where its weights are; returns its prediction."""
    config: Any = network.config
    weight = network.proj_out.weight if isinstance(network, SD3Transformer2DModel) else network.conv_in.weight
    settings: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    noisy = torch.randn(rows, config.in_channels, latents, latents, **settings)
    times = torch.zeros(rows, device=weight.device, dtype=torch.int64)
    if isinstance(network, SD3Transformer2DModel):
        context = torch.randn(rows, STABLE_DIFFUSION_3.tokens, config.joint_attention_dim, **settings)
        pooled = torch.randn(rows, config.pooled_projection_dim, **settings)
        return lambda: network(noisy, context, pooled, times, return_dict=False)[0]
    context = torch.randn(rows, SDXL.tokens, config.cross_attention_dim, **settings)
    added = None
    # What SDXL's UNet is given beside the caption's tokens.
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - _TIME_IDS * config.addition_time_embed_dim
        pooled, sizes = torch.randn(rows, width, **settings), torch.zeros(rows, _TIME_IDS, **settings)
        added = {"text_embeds": pooled, "time_ids": sizes}
    return lambda: network(noisy, times, context, added_cond_kwargs=added, return_dict=False)[0]


def elements(network: nn.Module) -> int:
    """Of all parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def parameter_bytes(network: nn.Module) -> float:
    """Of all parameters, in their formats."""
    return float(sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()))
