"""Networks of diffusers as the trainer sees them: each a `TrainableDenoiser` with the schedule it was trained on."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from popalign_core.alignment.denoiser import FlowSchedule, NoiseSchedule, Schedule


class NetworkDenoiser(nn.Module):
    """What the families have in common. A network of diffusers is its only part with parameters."""

    # The attribute that holds the network: the names of the parameters begin with it.
    part: str

    def __init__(self, network: nn.Module, schedule: Schedule):
        super().__init__()
        self.add_module(self.part, network)
        self.schedule = schedule

    @property
    def network(self) -> Any:
        """The network, as diffusers saves it."""
        return self.get_submodule(self.part)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters."""
        return super().named_parameters(prefix, recurse, remove_duplicate)


class UnetDenoiser(NetworkDenoiser):
    """A UNet that is conditioned on the caption's tokens alone."""

    part = "unet"
    unet: UNet2DConditionModel

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor) -> Tensor:
        """See `TrainableDenoiser`."""
        dtype = self.unet.conv_in.weight.dtype
        conditions = self.added_conditions(noisy, pooled, dtype)
        noisy, prompt_embeddings = noisy.to(dtype), prompt_embeddings.to(dtype)
        return self.unet(noisy, timesteps, prompt_embeddings, added_cond_kwargs=conditions, return_dict=False)[0]

    def added_conditions(
        self,
        noisy: Tensor,  # noqa: ARG002
        pooled: Tensor,  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
    ) -> dict[str, Tensor] | None:
        """What the UNet is given beside the caption's tokens."""
        return None


class SdxlDenoiser(UnetDenoiser):
    """A UNet with the pooled caption and the size conditions of one resolution."""

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, time_ids: Tensor):
        """time_ids: (1, 6), see `SdxlModel.time_ids`."""
        super().__init__(unet, schedule)
        self.register_buffer("time_ids", time_ids, persistent=False)

    def added_conditions(self, noisy: Tensor, pooled: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `UnetDenoiser`."""
        time_ids = self.get_buffer("time_ids").to(noisy.device, dtype).expand(len(noisy), -1)
        return {"text_embeds": pooled.to(dtype), "time_ids": time_ids}


class FlowDenoiser(NetworkDenoiser):
    """A transformer of SD3 that predicts a velocity; it is told the share of noise, times the number of timesteps."""

    part = "transformer"
    transformer: SD3Transformer2DModel
    schedule: FlowSchedule

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor) -> Tensor:
        """See `TrainableDenoiser`."""
        dtype = self.transformer.proj_out.weight.dtype
        times = self.schedule.sigmas.to(noisy.device)[timesteps] * len(self.schedule)
        return self.transformer(
            noisy.to(dtype),
            encoder_hidden_states=prompt_embeddings.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=times,
            return_dict=False,
        )[0]


def noise_schedule_of(scheduler: Any) -> NoiseSchedule:
    """The variance-preserving process of a scheduler of diffusers."""
    alphas: Tensor = scheduler.alphas_cumprod
    return NoiseSchedule(alphas.float(), scheduler.config.prediction_type)


def flow_schedule_of(scheduler: Any, tokens: int) -> FlowSchedule:
    """The rectified flow of a scheduler of diffusers, with the shift that it has at a resolution.

    tokens: patches of an image. More of them need more noise to be hidden as well, so the steps are shifted towards
    it; sigma becomes s sigma / (1 + (s - 1) sigma), with s fixed or exp(mu). Source: Esser et al. 2024, section 5.3.2.
    """
    config = scheduler.config
    # Drawing leaves the steps of a sampler in a scheduler: these are as it was made.
    sigmas: Tensor = FlowMatchEulerDiscreteScheduler.from_config(config).sigmas
    if config.use_dynamic_shifting:
        sigmas = scheduler.time_shift(resolution_shift(config, tokens), 1.0, sigmas)
    return FlowSchedule(sigmas.flip(0).float())


def resolution_shift(config: Any, tokens: int) -> float:
    """The `mu` of a scheduler that shifts with the resolution, linear in the tokens as in diffusers' pipelines."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (tokens - config.base_image_seq_len))


def repeated_blocks(network: Any) -> list[nn.Module]:
    """The blocks that a network is mostly made of, to be compiled once a kind."""
    # diffusers names no repeated blocks of SD3's transformer, but says which ones must not be split.
    names = network._repeated_blocks or network._no_split_modules
    return [module for module in network.modules() if type(module).__name__ in names]


def sharded_groups(network: Any) -> list[nn.Module]:
    """The modules whose weights a sharded training gathers one at a time: repeated blocks, and a UNet's convolutions.

    The rest of a network, small beside them, is gathered for a whole pass.
    """
    blocks = repeated_blocks(network)
    return blocks + [module for module in network.modules() if isinstance(module, ResnetBlock2D)]
