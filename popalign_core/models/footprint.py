"""Device memory and arithmetic of sampling and training, by running them on meta tensors: nothing is loaded."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from popalign_core.alignment.adapters import TrainablePart
from popalign_core.live_memory import Used, count_use
from popalign_core.models.architecture import Architecture, meta_unet, meta_vae
from popalign_core.models.denoisers import sharded_groups
from popalign_core.models.lora import add_lora
from popalign_core.models.sdxl import DTYPES, DtypeName

FLOAT32_BYTES = 4
TOKENS = 77
# Where the caption enters, as `popalign_core.alignment.adapters` names it.
_CONDITIONING = (".attn2.", ".add_embedding.")


@dataclass(frozen=True)
class Footprint:
    """parts: (what, bytes) at the moment of the peak, most lasting first. flop: of one image, or of one pair."""

    parts: tuple[tuple[str, float], ...]
    flop: float

    @property
    def bytes(self) -> float:
        """All parts together."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True)
class TrainingShape:
    """What decides a step's memory. side: pixels of an image, 0 = the model's own. pairs: in one pass.

    images_each: of a pair, 3 where named captions are preserved. dtype: of a frozen UNet under a LoRA. mixed: full
    fine-tuning with passes in bfloat16; else they are float32. averaged: whether a moving average of the weights is
    kept. further: whether a LoRA of an earlier round is the reference, kept beside the new one. eight_bit: AdamW's
    moments. shards: processes that what stays is divided over, in full fine-tuning.
    """

    side: int
    pairs: int
    dtype: DtypeName
    lora_rank: int
    trainable: TrainablePart
    checkpointing: bool
    images_each: int = 2
    mixed: bool = False
    averaged: bool = False
    further: bool = False
    eight_bit: bool = False
    shards: int = 1

    @property
    def computed_in(self) -> DtypeName:
        """Number format of the passes."""
        return self.dtype if self.lora_rank else "bfloat16" if self.mixed else "float32"


@lru_cache(maxsize=64)
def sampling_footprint(
    model: Architecture, *, side: int, batch: int, decoded: int, dtype: DtypeName, passes: int, guided: bool
) -> Footprint:
    """Of drawing a batch of images: UNet, VAE and text encoders loaded in the dtype.

    decoded: images that the VAE decodes at once. passes: calls of the UNet for an image, those of guidance counted.
    """
    number, latents = DTYPES[dtype], model.latent_side(side)
    unet, step = _unet_step(model, latents, batch * (2 if guided else 1), number)
    # The original VAE overflows in float16, so diffusers decodes in float32.
    upcast = number == torch.float16 and meta_vae(model.vae, number).config.force_upcast
    vae = meta_vae(model.vae, torch.float32 if upcast else number)
    weight = next(vae.parameters())
    inputs = torch.empty(decoded, vae.config.latent_channels, latents, latents, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        decoding = count_use(lambda: vae.decode(inputs, return_dict=False))
    name, most = max((("activations of the UNet", step), ("activations of the VAE", decoding)), key=_peak)
    parts = (
        ("UNet", _bytes(unet)),
        ("VAE", _bytes(vae)),
        ("text encoders", float(model.text_elements * number.itemsize)),
        (name, float(most.peak_bytes)),
    )
    images = batch * (2 if guided else 1)
    return Footprint(parts, passes * step.flop / images + decoding.flop / decoded)


def _peak(named: tuple[str, Used]) -> int:
    return named[1].peak_bytes


@lru_cache(maxsize=8)
def _unet_step(
    model: Architecture, latents: int, images: int, number: torch.dtype
) -> tuple[UNet2DConditionModel, Used]:
    unet = meta_unet(model.unet, number).eval().requires_grad_(False)
    call = unet_call(unet, latents, images)
    with torch.no_grad():
        return unet, count_use(call)


def unet_call(unet: UNet2DConditionModel, latents: int, images: int) -> Any:
    """A call of the UNet on inputs of that many images, made where its weights are; returns its prediction."""
    weight = next(unet.parameters())
    config = unet.config
    settings: dict[str, Any] = {"device": weight.device, "dtype": unet.conv_in.weight.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    arguments = (
        torch.randn(images, config.in_channels, latents, latents, **settings),
        torch.zeros(images, device=weight.device, dtype=torch.int64),
        torch.randn(images, TOKENS, config.cross_attention_dim, **settings),
    )
    conditions = {
        "text_embeds": torch.randn(images, pooled, **settings),
        "time_ids": torch.zeros(images, 6, **settings),
    }
    return lambda: unet(*arguments, added_cond_kwargs=conditions, return_dict=False)[0]


@lru_cache(maxsize=64)
def training_footprint(model: Architecture, shape: TrainingShape) -> Footprint:
    """Of one training step: what stays, and the most that a step adds; flop of a pair, the reference counted.

    UNet, VAE and text encoders are loaded. Gradients, AdamW's two moments and the average are float32 of what is
    trained; AdamW works on a copy of the second moment. Full fine-tuning has a second UNet as its reference; in mixed
    precision that one is bfloat16, and so is a copy of the weights that the passes compute with. Where sharded, a part
    of all this, and what is gathered for a moment; the copy for the passes is whole except under checkpointing.
    """
    computed, stored = DTYPES[shape.computed_in], DTYPES[shape.dtype] if shape.lora_rank else torch.float32
    unet = meta_unet(model.unet, computed)
    base = _elements(unet)
    prepare_training(unet, shape)
    latents = model.latent_side(shape.side)
    step, reference = training_step(unet, latents, shape.pairs * shape.images_each, keep_gradients=shape.shards == 1)
    count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    trained = FLOAT32_BYTES * count / shape.shards
    seen = count * (4 if shape.lora_rank else computed.itemsize) if shape.shards == 1 else 0
    held, passing = base / shape.shards, base * computed.itemsize if shape.mixed and not shape.lora_rank else 0
    frozen = model.text_elements + _elements(meta_vae(model.vae, computed))
    parts = {
        "UNet": held * stored.itemsize,
        "LoRA" if shape.lora_rank else "reference": trained if shape.lora_rank else held * computed.itemsize,
        "weights to compute with": 0 if shape.shards > 1 and shape.checkpointing else passing,
        "gathered for a moment": _gathered(unet) * (2 * FLOAT32_BYTES + 2 * shape.mixed) if shape.shards > 1 else 0,
        "VAE and text encoders": frozen * stored.itemsize,
        "gradients": trained,
        "AdamW's moments": trained / 2 if shape.eight_bit else 2 * trained,
        "copies of what is trained": trained * (shape.averaged + bool(shape.further and shape.lora_rank)),
        # The peak of a pass holds the gradients that are there by then; the optimizer comes after it.
        "activations": max(step.peak_bytes - seen, trained),
    }
    if shape.shards > 1:
        # Every process loads the model whole before it keeps a part.
        parts["loaded at first"] = max(0.0, (base + frozen) * stored.itemsize - sum(parts.values()))
    flop = (step.flop + reference.flop) / shape.pairs
    return Footprint(tuple((name, float(size)) for name, size in parts.items() if size), flop)


def prepare_training(unet: UNet2DConditionModel, shape: TrainingShape) -> None:
    """Adapter, trainable part and checkpointing as `make_policy` sets them."""
    unet.train(False)
    if shape.checkpointing:
        unet.train().enable_gradient_checkpointing()
    if shape.lora_rank:
        add_lora(unet, shape.lora_rank, "attention" if shape.trainable == "all" else "cross_attention", 0)
        return
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(shape.trainable == "all" or any(part in f".{name}." for part in _CONDITIONING))


def training_step(
    unet: UNet2DConditionModel, latents: int, images: int, *, keep_gradients: bool = True
) -> tuple[Used, Used]:
    """Forward and backward pass of the policy, and the reference's forward pass.

    keep_gradients: False where each leaves as it comes, as in a sharded training.
    """
    call = unet_call(unet, latents, images)
    for parameter in () if keep_gradients else unet.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with torch.no_grad():
        reference = count_use(call)
    return count_use(lambda: call().float().square().mean().backward()), reference


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _gathered(unet: UNet2DConditionModel) -> int:
    """Elements that a sharded training has whole at once: those of no group, a group, and the next on its way."""
    groups = [_elements(group) for group in sharded_groups(unet)]
    return _elements(unet) - sum(groups) + 2 * max(groups)


def _elements(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: torch.nn.Module) -> float:
    return float(sum(parameter.numel() * parameter.element_size() for parameter in network.parameters()))
