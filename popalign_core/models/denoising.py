"""From noise to latents to pixels: the loop of diffusers' pipelines, bit for bit, in one fixed shape.

A loop of its own, because the pipeline decodes a batch at once, wants all its parts on one device, waits for the
accelerator at every step, and has no place for what is skipped or kept here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from popalign_core.acceleration import DEFAULT, Acceleration
from popalign_core.errors import InvalidInput
from popalign_core.models.attention import (
    AttentionName,
    UnetAttention,
    attentions,
    fuse_projections,
    ignores_empty_context,
    is_plain,
)
from popalign_core.models.cuda_graphs import GraphedUnet
from popalign_core.models.denoisers import repeated_blocks
from popalign_core.models.families import SDXL
from popalign_core.models.latent_scaling import unscaled
from popalign_core.models.prompt_embeddings import PromptEmbeddings
from popalign_core.models.sdxl import SCHEDULERS, SchedulerName
from popalign_core.models.text_to_image import TextToImageModel

# The attention settings under which code compiled in this process was traced.
_traced: set[AttentionName] = set()


@dataclass(frozen=True)
class Trajectory:
    """How noise becomes latents. height, width in pixels."""

    scheduler: SchedulerName
    steps: int
    guidance_scale: float
    height: int
    width: int


class Denoising:
    """Batches of one shape from one model. Making it sets the model's processors and memory layout."""

    def __init__(
        self,
        model: TextToImageModel,
        trajectory: Trajectory,
        acceleration: Acceleration = DEFAULT,
        attention: AttentionName = "default",
    ):
        """attention: the kernel that it is called under.

        Raises: InvalidInput for a size that does not fit the model, or a switch that cannot be used with it.
        """
        model.check_size(trajectory.height, trajectory.width)
        model.family.check_scheduler(trajectory.scheduler)
        self.model, self.trajectory, self.acceleration = model, trajectory, acceleration
        self.scheduler = _scheduler(model, trajectory.scheduler)
        _apply(model, acceleration, attention)
        self._guided = trajectory.guidance_scale > 1
        self._empty = model.encode_unconditional() if self._guided else None
        self._skips = self._guided and skips_empty_attention(model, acceleration)
        self._network: Any = GraphedUnet(model.network) if acceleration.cuda_graphs else model.network

    def denoise(self, prompts: PromptEmbeddings, seeds: Sequence[int]) -> Tensor:
        """Latents (n, c, h, w) on the model's device, scaled as the UNet knows them. prompts: a row a seed."""
        scheduler, device = self.scheduler, self.model.device
        # Times that lie on the accelerator would make the scheduler wait for it at every step.
        shift = self.model.shift(self.trajectory.height, self.trajectory.width)
        scheduler.set_timesteps(self.trajectory.steps, device="cpu", **shift)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        # CPU generators: the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        more = {"generator": generators} if "generator" in signature(scheduler.step).parameters else {}
        conditions = self._conditions(prompts, len(seeds))
        # A flow begins and is entered as it is.
        latents = self._noise(generators).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
        flows = not hasattr(scheduler, "scale_model_input")
        for time, placed in zip(scheduler.timesteps, scheduler.timesteps.to(device), strict=True):
            entered = torch.cat([latents] * 2) if self._guided else latents
            entered = entered if flows else scheduler.scale_model_input(entered, time)
            predicted = self._network(
                entered, timestep=placed.expand(len(entered)) if flows else placed, **conditions, return_dict=False
            )[0]
            if self._guided:
                without, with_prompt = predicted.chunk(2)
                predicted = without + self.trajectory.guidance_scale * (with_prompt - without)
            latents = scheduler.step(predicted, time, latents, return_dict=False, **more)[0]
        return latents

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        network, scale = self.model.network, self.model.pixels_per_latent
        shape = (1, int(network.config.in_channels), self.trajectory.height // scale, self.trajectory.width // scale)
        return torch.cat([torch.randn(shape, generator=generator, dtype=network.dtype) for generator in generators])

    def _conditions(self, prompts: PromptEmbeddings, count: int) -> dict[str, Any]:
        device = self.model.device
        context, pooled = prompts.context.to(device), prompts.pooled.to(device)
        if self._empty is not None:
            pooled = torch.cat([self._empty.pooled.to(device).expand(count, -1), pooled])
            if not self._skips:
                context = torch.cat([self._empty.context.to(device).expand(count, -1, -1), context])
        return self.model.conditions(context, pooled, self.trajectory.height, self.trajectory.width)

    def decoded_at_once(self, batch: int) -> int:
        """Latents that are decoded at once, unless memory does not suffice."""
        trajectory, device = self.trajectory, self.model.device
        return self.acceleration.decoded_at_once(batch, device.type, trajectory.height, trajectory.width)

    def decode(self, latents: Tensor, at_once: int = 0) -> np.ndarray:
        """Pixels, uint8 (n, h, w, 3). at_once: latents given to the VAE in one fixed shape, 0 = `decoded_at_once`.

        The last of them are padded, so that an image's pixels do not depend on its place among the latents.
        Raises: InvalidInput where pixels are no numbers.
        """
        size = min(at_once or self.decoded_at_once(len(latents)), len(latents))
        padding = latents[-1:].expand(-len(latents) % size, -1, -1, -1)
        parts: tuple[Tensor, ...] = torch.split(torch.cat([latents, padding]), size)
        # Rounded on the device: a quarter of the bytes to move.
        pixels = torch.cat([self._pixels(part) for part in parts])[: len(latents)]
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    def _pixels(self, latents: Tensor) -> Tensor:
        vae = self.model.pipeline.vae
        image = vae.decode(unscaled(latents.to(vae.dtype), vae.config), return_dict=False)[0]
        # Before they are clamped, which makes white and black of what is infinite.
        if not bool(torch.isfinite(image).all()):
            raise InvalidInput(
                f"the model drew pixels that are no numbers in {str(vae.dtype).removeprefix('torch.')}; "
                "use sampling.dtype bfloat16 or float32, or acceleration.vae_dtype float32."
            )
        image = (image * 0.5 + 0.5).clamp(0, 1).float()
        return (image * 255).round().to(torch.uint8)


def _scheduler(model: TextToImageModel, name: SchedulerName) -> Any:
    """The scheduler asked for, on the checkpoint's own noise schedule.

    Latents are no pixels: diffusers' pipelines of Stable Diffusion do not clip them, whatever a config says, and a
    config of Euler's or DPM-Solver++'s says nothing, for which DDIM takes its default, that of pixels: [-1, 1].
    """
    own, wanted = model.pipeline.scheduler, SCHEDULERS[name]
    unclipped = {} if isinstance(own, (wanted, DDIMScheduler)) else {"clip_sample": False, "thresholding": False}
    return wanted.from_config(own.config, **unclipped)


def skips_empty_attention(model: TextToImageModel, acceleration: Acceleration) -> bool:
    """Whether the unconditional half of a batch goes without cross-attention: asked for, and exact for this model."""
    exact = model.has_zero_unconditional and ignores_empty_context(model.network)
    return acceleration.skip_empty_attention and exact


def _apply(model: TextToImageModel, acceleration: Acceleration, attention: AttentionName) -> None:
    """Brings a model to these switches, whatever it had before."""
    if acceleration.cuda_graphs and model.device.type != "cuda":
        raise InvalidInput(f"acceleration.cuda_graphs needs a CUDA device, and this is {model.device.type}.")
    unet, vae = model.network, model.pipeline.vae
    if acceleration.cuda_graphs and model.family is not SDXL:
        raise InvalidInput(f"acceleration.cuda_graphs is for SDXL, and this is {model.family.title}: turn it off.")
    if acceleration.fused_projections:
        fuse_projections(unet)
    in_channels_last = acceleration.in_channels_last(model.device.type)
    layout = torch.channels_last if in_channels_last else torch.contiguous_format
    for part in (unet, vae):
        part.to(memory_format=layout)
    wanted = UnetAttention(fused=acceleration.fused_projections)
    # What is compiled would be compiled again for other processors, equal ones included.
    if is_plain(unet) and any(module.processor != wanted for _, module in attentions(unet)):
        unet.set_attn_processor(wanted)
    _compile(unet, acceleration, attention)


def _compile(unet: Any, acceleration: Acceleration, attention: AttentionName) -> None:
    before, model_mode = getattr(unet, "popalign_compiled", "none"), acceleration.compile
    wanted = f"{model_mode} {acceleration.fused_projections} {acceleration.channels_last}"
    if model_mode != "none":
        # What is traced keeps its attention kernel, for the next model of the same code too: dynamo has no guard on it.
        if _traced - {attention}:
            torch.compiler.reset()
            _traced.clear()
        _traced.add(attention)
    if before == wanted or (before == "none" and model_mode == "none"):
        return
    blocks = repeated_blocks(unet)
    for module in (unet, *blocks):
        module._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
    for module in {"none": [], "regional": blocks, "full": [unet]}[model_mode]:
        module.compile(dynamic=False)
    unet.popalign_compiled = "none" if model_mode == "none" else wanted
