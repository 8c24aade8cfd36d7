"""Labelled pictures for the two judges, softened as the generator's pictures are (builder only)."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from popalign_core.models.emoji.autoencoder import as_pixels
from popalign_core.models.emoji.data import EmojiSet

NO_LABEL = -1
LATENT_NOISE = (0.0, 0.15, 0.35)  # deviations added to whitened latents: stands for what sampling gets wrong


@dataclass(frozen=True)
class Pictures:
    """pixels: float (copies, n, 3, 64, 64) in [-1, 1]: the drawing, then softened copies. Labels (n,), -1 = hidden.

    person: (n,) bool. role, gender and tone of a picture without a person are -1.
    """

    pixels: Tensor
    vendor: Tensor
    role: Tensor
    gender: Tensor
    tone: Tensor
    person: Tensor

    def __len__(self) -> int:
        return len(self.vendor)


@torch.no_grad()
def softened(pixels: Tensor, vae: AutoencoderKL, generator: torch.Generator) -> Tensor:
    """Stacks the pictures with their round trips through the autoencoder at several latent noise levels."""
    copies = [pixels]
    for deviation in LATENT_NOISE:
        parts: list[Tensor] = []
        for part in torch.split(pixels, 128):
            mean = vae.encode(part).latent_dist.mean
            parts.append(vae.decode(mean + deviation * torch.randn(mean.shape, generator=generator)).sample)
        copies.append(torch.cat(parts).clamp(-1, 1))
    return torch.stack(copies)


def labelled_pictures(people: EmojiSet, objects: tuple[np.ndarray, np.ndarray], vae: AutoencoderKL) -> Pictures:
    """People with the labels that their drawing shows, and objects."""
    object_images, object_vendor = objects
    none = np.full(len(object_images), NO_LABEL)
    gender = np.where(people.gender_visible, people.gender, NO_LABEL)
    tone = np.where(people.tone_visible, people.tone, NO_LABEL)
    pixels = as_pixels(np.concatenate([people.images, object_images]))
    return Pictures(
        pixels=softened(pixels, vae, torch.Generator().manual_seed(0)),
        vendor=torch.from_numpy(np.concatenate([people.vendor, object_vendor])),
        role=torch.from_numpy(np.concatenate([people.role, none])),
        gender=torch.from_numpy(np.concatenate([gender, none])),
        tone=torch.from_numpy(np.concatenate([tone, none])),
        person=torch.from_numpy(np.concatenate([np.ones(len(people.images), bool), np.zeros(len(none), bool)])),
    )


def augmented(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Random flip, shift up to 5 pixels, scale by 0.85 to 1.15, brightness +-4% and blur; white outside."""
    count = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    scale = 1 / uniform(0.85, 1.15)
    flip = torch.where(torch.rand(count, generator=rng) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-0.16, 0.16), uniform(-0.16, 0.16)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    # Sampling the difference from white makes the zero padding white.
    moved = 1 - functional.grid_sample(1 - pixels, grid, align_corners=False)
    dimmed = (moved + 1) * uniform(0.96, 1.04)[:, None, None, None] - 1
    blurred = functional.avg_pool2d(functional.pad(dimmed, (1, 1, 1, 1), value=1.0), 3, stride=1)
    share = uniform(0.0, 0.6)[:, None, None, None]
    return ((1 - share) * dimmed + share * blurred).clamp(-1, 1)
