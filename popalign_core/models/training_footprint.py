"""Device memory and arithmetic of training, by running a step of it on meta tensors: nothing is loaded."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from popalign_core.alignment.adapters import TrainablePart
from popalign_core.live_memory import Used, count_use
from popalign_core.models.architecture import Architecture, meta_denoiser, meta_vae
from popalign_core.models.denoisers import sharded_groups
from popalign_core.models.footprint import (
    Footprint,
    Parts,
    at_the_peak,
    count_decoding,
    elements,
    network_call,
    parameter_bytes,
    vae_number,
)
from popalign_core.models.lora import Network, add_lora
from popalign_core.models.sdxl import DTYPES, DtypeName

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class DrawnGroups:
    """What a policy gradient draws for an update: groups of so many images each.

    at_once: images that pass through the model and are decoded at once. steps: of the chain, and trained those that are
    differentiated of an image. builder_bytes: weights of the classifier that tells what was drawn.
    """

    groups: int
    images: int
    at_once: int
    steps: int
    trained: int
    builder_bytes: float


@dataclass(frozen=True)
class TrainingShape:
    """What decides a step's memory. side: pixels of an image, 0 = the model's own. pairs: in one pass.

    images_each: of a pair, 3 where named captions are preserved. dtype: of a frozen denoiser under a LoRA. mixed: full
    fine-tuning with passes in bfloat16; else they are float32. averaged: whether a moving average of the weights is
    kept. further: whether a LoRA of an earlier round is the reference, kept beside the new one. eight_bit: AdamW's
    moments. shards: processes that what stays is divided over, in full fine-tuning. encoded: images that the VAE
    encodes at once before the first step, 0 = none. encoders_stay: as in `SamplingShape`. drawn: of a policy gradient;
    its pairs are then steps of images, each of 2 rows where they are guided, and its passes never mixed.
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
    encoded: int = 0
    encoders_stay: bool = False
    drawn: DrawnGroups | None = None

    @property
    def computed_in(self) -> DtypeName:
        """Number format of the passes."""
        if self.lora_rank:
            return self.dtype
        return "bfloat16" if self.mixed and self.drawn is None else "float32"

    @property
    def loaded_in(self) -> DtypeName:
        """Number format of the weights that are loaded."""
        return self.dtype if self.lora_rank else "float32"


@lru_cache(maxsize=64)
def training_footprint(model: Architecture, shape: TrainingShape) -> Footprint:
    """Of a training, the most of these moments: encoding captions, encoding images, drawing, a step.

    The flop are of a pair, the reference counted; of a policy gradient those of an update. The VAE stays loaded, the
    text encoders are moved away after the captions were encoded. Of a policy gradient the upper bound is counted, that
    no image is on its target; what its classifier takes beside its weights is less than the VAE takes.
    """
    vae = meta_vae(model, vae_number(model, shape.loaded_in))
    first = (
        (model.denoiser_name, elements(meta_denoiser(model, torch.float32)) * DTYPES[shape.loaded_in].itemsize),
        ("VAE", parameter_bytes(vae)),
    )
    texts = (("text encoders", float(model.text_elements * DTYPES[shape.loaded_in].itemsize)),)
    stay = texts if shape.encoders_stay else ()
    latents = model.latent_side(shape.side)
    lasting, step, flop = _step_parts(model, shape, latents)
    lasting = (lasting[0], *first[1:], *stay, *lasting[1:])
    # Every process loads the model whole before it keeps a part of it.
    moments = [(*first, *texts), (*lasting, step)]
    if shape.encoded:
        encoding = _count_encoding(vae, shape.encoded, latents * model.pixels_per_latent)
        moments.append((*first, *stay, ("activations of the VAE", encoding.peak_bytes)))
    if shape.drawn is not None:
        drawing, drawing_flop = _drawing(model, shape, shape.drawn, vae)
        moments.append((*lasting, drawing))
        flop = drawing_flop + flop * shape.drawn.groups * shape.drawn.images * shape.drawn.trained
    return Footprint(at_the_peak(moments), flop)


def _step_parts(model: Architecture, shape: TrainingShape, latents: int) -> tuple[Parts, tuple[str, float], float]:
    """What stays beside VAE and text encoders, the denoiser first; what a step adds; flop of a pair.

    Gradients, AdamW's two moments and the average are float32 of what is trained; AdamW works on a copy of the second
    moment. Full fine-tuning has a second denoiser as its reference; in mixed precision that one is bfloat16, and so is
    a copy of the weights that the passes compute with. Where sharded, a part of all this, and what is gathered for a
    moment; the copy for the passes is whole except under checkpointing.
    """
    computed = DTYPES[shape.computed_in]
    network = meta_denoiser(model, computed)
    base = elements(network)
    prepare_training(network, shape, model.family.conditioning)
    step, reference = training_step(network, latents, shape.pairs * shape.images_each, keep_gradients=shape.shards == 1)
    count = sum(p.numel() for p in network.parameters() if p.requires_grad)
    trained = FLOAT32_BYTES * count / shape.shards
    seen = count * (4 if shape.lora_rank else computed.itemsize) if shape.shards == 1 else 0
    held, rounded = base / shape.shards, shape.mixed and not shape.lora_rank
    passing = base * computed.itemsize if rounded and shape.drawn is None else 0
    parts = (
        (model.denoiser_name, held * DTYPES[shape.loaded_in].itemsize),
        ("LoRA", trained) if shape.lora_rank else ("reference", held * (2 if rounded else FLOAT32_BYTES)),
        ("weights to compute with", 0 if shape.shards > 1 and shape.checkpointing else passing),
        ("gathered for a moment", _gathered(network) * (2 * FLOAT32_BYTES + 2 * rounded) if shape.shards > 1 else 0),
        ("gradients", trained),
        ("AdamW's moments", trained / 2 if shape.eight_bit else 2 * trained),
        ("copies of what is trained", trained * (shape.averaged + bool(shape.further and shape.lora_rank))),
        *_drawn_parts(model, shape),
    )
    # The peak of a pass holds the gradients that are there by then; the optimizer comes after it.
    return parts, ("activations", max(step.peak_bytes - seen, trained)), (step.flop + reference.flop) / shape.pairs


def _drawn_parts(model: Architecture, shape: TrainingShape) -> Parts:
    """Of a policy gradient: its classifier, and the states of all groups, which are there before the first step."""
    if shape.drawn is None:
        return ()
    images = shape.drawn.groups * shape.drawn.images
    states = (shape.drawn.steps + 1) * images * model.latent_elements(shape.side) * FLOAT32_BYTES
    return ("classifier", shape.drawn.builder_bytes), ("drawn states", states)


def _drawing(
    model: Architecture, shape: TrainingShape, drawn: DrawnGroups, vae: nn.Module
) -> tuple[tuple[str, float], float]:
    """The most that drawing adds; flop of all groups."""
    latents, number = model.latent_side(shape.side), DTYPES[shape.computed_in]
    network = meta_denoiser(model, number).eval()
    with torch.no_grad():
        step = count_use(network_call(network, latents, drawn.at_once * shape.images_each))
    decoding = count_decoding(vae, drawn.at_once, latents)
    flop = (drawn.steps * step.flop + decoding.flop) * drawn.groups * drawn.images / drawn.at_once
    names = (f"activations of the {model.denoiser_name}", step), ("activations of the VAE", decoding)
    name, most = max(names, key=lambda named: named[1].peak_bytes)
    return (name, float(most.peak_bytes)), flop


def _count_encoding(vae: Any, images: int, side: int) -> Used:
    pixels = torch.empty(images, vae.config.in_channels, side, side, device="meta", dtype=next(vae.parameters()).dtype)
    with torch.no_grad():
        return count_use(lambda: vae.encode(pixels, return_dict=False))


def prepare_training(network: Network, shape: TrainingShape, conditioning: tuple[str, ...]) -> None:
    """Adapter, trainable part and checkpointing as `make_policy` sets them. conditioning: of the family."""
    network.train(False)
    if shape.checkpointing:
        network.train().enable_gradient_checkpointing()
    if shape.lora_rank:
        add_lora(network, shape.lora_rank, "attention" if shape.trainable == "all" else "cross_attention", 0)
        return
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(shape.trainable == "all" or any(part in f".{name}." for part in conditioning))


def training_step(network: Network, latents: int, rows: int, *, keep_gradients: bool = True) -> tuple[Used, Used]:
    """Forward and backward pass of the policy, and the reference's forward pass.

    keep_gradients: False where each leaves as it comes, as in a sharded training.
    """
    call: Any = network_call(network, latents, rows)
    for parameter in () if keep_gradients else network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with torch.no_grad():
        reference = count_use(call)
    return count_use(lambda: call().float().square().mean().backward()), reference


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _gathered(network: Network) -> int:
    """Elements that a sharded training has whole at once: those of no group, a group, and the next on its way."""
    groups = [elements(group) for group in sharded_groups(network)]
    return elements(network) - sum(groups) + 2 * max(groups)
