"""An SDXL UNet as the trainer sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from popalign_core.alignment.adapters import FullPolicy, LoraPolicy, Policy, TrainablePart
from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.models.lora import add_lora, load_lora, save_lora
from popalign_core.models.sdxl import SdxlModel


class SdxlDenoiser(nn.Module):
    """A UNet with its schedule and the size conditions of one resolution."""

    def __init__(self, unet: UNet2DConditionModel, schedule: NoiseSchedule, time_ids: Tensor):
        """time_ids: (1, 6), see `SdxlModel.time_ids`."""
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.register_buffer("time_ids", time_ids, persistent=False)

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor) -> Tensor:
        """See `TrainableDenoiser`."""
        # Adapters keep a float32 of their own, so the UNet's first layer says what it computes in.
        dtype = self.unet.conv_in.weight.dtype
        time_ids = self.get_buffer("time_ids").to(noisy.device, dtype).expand(len(noisy), -1)
        conditions = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        noisy, prompt_embeddings = noisy.to(dtype), prompt_embeddings.to(dtype)
        return self.unet(noisy, timesteps, prompt_embeddings, added_cond_kwargs=conditions, return_dict=False)[0]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The UNet's parameters."""
        return super().named_parameters(prefix, recurse, remove_duplicate)


def noise_schedule(model: SdxlModel) -> NoiseSchedule:
    """The forward process that a pipeline was trained on."""
    scheduler = model.pipeline.scheduler
    alphas: Tensor = scheduler.alphas_cumprod
    return NoiseSchedule(alphas.float(), scheduler.config.prediction_type)


@dataclass(frozen=True)
class PassOptions:
    """How passes are computed.

    gradient_checkpointing: activations are computed twice instead of kept. mixed_precision: as in the settings.
    compiled: the UNet's repeated blocks through torch.compile, each kind once.
    """

    gradient_checkpointing: bool = False
    mixed_precision: bool = False
    compiled: bool = False


PLAIN = PassOptions()


def make_policy(
    model: SdxlModel,
    *,
    lora_rank: int,
    trainable: TrainablePart = "all",
    seed: int,
    earlier_lora: Path | None = None,
    passes: PassOptions = PLAIN,
    image_size: int = 0,
) -> Policy:
    """A policy over a loaded model's UNet: fine-tuning in float32 (rank 0) of that part, or a LoRA adapter on it.

    The adapter is on all attention, or on cross-attention alone where the conditioning is the part to train.
    earlier_lora: folder of the adapter of the round before; training goes on from it and compares with it. The model
    must then have been loaded without an adapter. image_size: pixels a side that the images were drawn at, which SDXL
    is conditioned on; 0 = the model's own.
    """
    unet = model.pipeline.unet
    side = image_size or model.native_size
    denoiser = SdxlDenoiser(unet, noise_schedule(model), model.time_ids(side, side))
    denoiser.to(model.device)
    if passes.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if lora_rank == 0:
        # Master weights in float32: at these learning rates an update is lost in bfloat16.
        unet.to(torch.float32)
        policy = FullPolicy(denoiser, trainable, mixed_precision=passes.mixed_precision)
    elif earlier_lora is not None:
        load_lora(unet, earlier_lora)
        policy = LoraPolicy(denoiser, unet, reference_at="start")
    else:
        add_lora(unet, lora_rank, "attention" if trainable == "all" else "cross_attention", seed)
        policy = LoraPolicy(denoiser, unet)
    if passes.compiled:
        _compile_blocks(policy)
    return policy


def _compile_blocks(policy: Policy) -> None:
    """Policy and reference alike: a reference computed by other kernels would differ from the policy by rounding."""
    with policy.reference() as reference:
        for denoiser in {id(each): each for each in (policy.denoiser, reference)}.values():
            assert isinstance(denoiser, SdxlDenoiser)  # made by make_policy
            denoiser.unet.compile_repeated_blocks(fullgraph=True)


def save_weights(policy: Policy, folder: Path, *, lora: bool) -> None:
    """Writes what was trained: `unet/` as diffusers saves it, or `lora/` as `load_lora_weights` reads it."""
    denoiser = policy.denoiser
    assert isinstance(denoiser, SdxlDenoiser)  # made by make_policy
    part = folder / ("lora" if lora else "unet")
    part.mkdir()
    if lora:
        save_lora(denoiser.unet, part)
    else:
        denoiser.unet.save_pretrained(part, safe_serialization=True)
