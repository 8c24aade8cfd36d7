"""Trains the emoji model's variational autoencoder (builder only).

SDXL's AutoencoderKL at a small size: 64 x 64 x 3 pixels <-> 16 x 16 x 8 latents. (An 8 x 8 x 16 grid was tried: as
fast for the denoiser, and still blurred after the same training time.) Latents are whitened channel by channel by
folding the measured mean and deviation into the 1 x 1 convolutions on either side, so `scaling_factor` is 1.
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

LATENT_CHANNELS = 8
logger = logging.getLogger(__name__)


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder of the emoji model's shape."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (n, h, w, 3) -> float (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _edges(pixels: Tensor) -> Tensor:
    return torch.cat([pixels.diff(dim=-1).flatten(1), pixels.diff(dim=-2).flatten(1)], dim=1)


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    padded = functional.pad(pixels, (3, 3, 3, 3), value=1.0)
    top, left = (int(offset) for offset in torch.randint(0, 7, (2,), generator=generator))
    return padded[:, :, top : top + 64, left : left + 64]


def train_autoencoder(
    pixels: Tensor, *, seconds: float, seed: int, checkpoint: Path, batch: int = 10, peak_lr: float = 2e-3
) -> AutoencoderKL:
    """Fits the autoencoder for a given time; saves it to `checkpoint` once a minute and at the end.

    pixels: float (n, 3, 64, 64) in [-1, 1].
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = new_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, weight_decay=1e-4)
    start, saved, step = time.monotonic(), 0.0, 0
    while (elapsed := time.monotonic() - start) < seconds:
        done = elapsed / seconds
        optimizer.param_groups[0]["lr"] = peak_lr * min(1.0, (step + 1) / 50) * (1 - done) + 1e-6
        real = _shifted(pixels[torch.randint(0, len(pixels), (batch,), generator=generator)], generator)
        posterior = vae.encode(real).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        error = (drawn - real).abs().mean() + 0.5 * functional.mse_loss(drawn, real)
        sharpness = (_edges(drawn) - _edges(real)).abs().mean()
        loss = error + sharpness + 1e-7 * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed - saved > 60:
            saved = elapsed
            vae.save_pretrained(checkpoint)
            logger.info("autoencoder %.0f s, step %d, loss %.4f, pixels %.4f", elapsed, step, loss.item(), error.item())
    _whiten(vae, pixels)
    vae.save_pretrained(checkpoint)
    return vae


@torch.no_grad()
def _whiten(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Folds the latents' mean and deviation per channel into quant_conv and post_quant_conv: exact, no new option."""
    moments = torch.cat([vae._encode(part) for part in torch.split(pixels, 128)])
    mean, logvar = moments.chunk(2, dim=1)
    center = mean.mean(dim=(0, 2, 3))
    spread = (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
    quant, post = vae.quant_conv, vae.post_quant_conv
    assert quant is not None  # built above
    assert post is not None
    shift = torch.cat([center, 2 * spread.log()])
    scale = torch.cat([1 / spread, torch.ones_like(spread)])
    assert quant.bias is not None
    assert post.bias is not None
    quant.weight.mul_(scale[:, None, None, None])
    quant.bias.sub_(shift).mul_(scale)
    # The decoder saw z; it now gets (z - center) / spread.
    post.bias.add_(post.weight[:, :, 0, 0] @ center)
    post.weight.mul_(spread[None, :, None, None])
