"""The VAE's own latents and the scaled ones that the denoiser knows: one rule, by the VAE's configuration.

Either a factor with an optional shift, as in SDXL and Stable Diffusion 3, or a mean and a deviation of each channel, as
in SDXL-like models with a VAE of their own, such as Playground 2.5.
"""

from typing import Any

import torch
from torch import Tensor


def scaled_moments(mean: Tensor, deviation: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Of the encoder's posterior, each (n, c, h, w), as the denoiser expects latents. config: of the VAE."""
    if (channels := _channels(config, mean)) is not None:
        shift, spread = channels
        return (mean - shift) * config.scaling_factor / spread, deviation * config.scaling_factor / spread
    shift = getattr(config, "shift_factor", None) or 0.0
    return (mean - shift) * config.scaling_factor, deviation * config.scaling_factor


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents (n, c, h, w) as the VAE decodes them, from those of the denoiser. config: of the VAE."""
    if (channels := _channels(config, latents)) is not None:
        shift, spread = channels
        return latents * spread / config.scaling_factor + shift
    shift = getattr(config, "shift_factor", None)
    return latents / config.scaling_factor + shift if shift else latents / config.scaling_factor


def _channels(config: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation of each channel, (1, c, 1, 1); None where the VAE states none."""
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return None
    shift, spread = (torch.tensor(values).view(1, -1, 1, 1).to(like) for values in (mean, deviation))
    return shift, spread
