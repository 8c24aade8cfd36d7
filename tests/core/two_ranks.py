"""A small denoiser that sees captions, pairs to train it on, and processes to train it in."""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from popalign_core.alignment.adapters import FullPolicy, LoraPolicy, Policy, trainable_parameters
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.alignment.settings import AlignmentSettings

SHAPE = (2, 4, 4)
CAPTIONS, WIDTH, PAIRS = 5, 6, 24
# An odd number of pairs: the processes have shares of different sizes.
SETTINGS = AlignmentSettings(
    steps=8,
    pairs_per_step=7,
    learning_rate=1e-3,
    beta=20.0,
    caption_dropout=0.3,
    caption_mixing=0.6,
    timestep_sampling="stratified",
    seed=5,
)
VARIANTS = {
    "popalign": SETTINGS,
    "dpo": replace(SETTINGS, objective="dpo"),
    "sft": replace(SETTINGS, objective="sft"),
    # Populations of 3, 5, 4, 4, 2 and 6 pairs, two or three in a step.
    "exact": replace(SETTINGS, objective="popalign_exact", pairs_per_step=18),
    "all": replace(SETTINGS, anchor_weight=1.0, preserve_weight=3.0, winner_preserving=True, ema_decay=0.9),
    "lora": replace(SETTINGS, steps=3),
    # The reference is the adapter that training goes on from.
    "further-lora": replace(SETTINGS, steps=3),
}
# Rounding. A pair's mean squared error m (below 4 here) is off by some 8 roundings of 2^-24, since its sums are taken
# over 32 elements and 45 inputs; g is the difference of two, and the loss has at most the slope beta by it:
# 20 * 2 * 4 * 8 * 2^-24 = 8e-5 if all were off the same way. They are not: over 7 pairs and 64 roundings without a
# common sign a tenth of it is left (seen: 7e-7). Weights differ by what rounding does to a step, which is of second
# order in a loss.
LOSS_TOLERANCE = 1e-5
# The gradient has the same relative error as the errors, and the slope of the loss by g varies by beta as well.
NORM_TOLERANCE = 1e-4


class CaptionDenoiser(nn.Module):
    """Two layers over the noisy latent, the time and the caption."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        elements = int(np.prod(SHAPE))
        sizes = ((hidden, elements + 1 + 2 * WIDTH), (elements, hidden))
        self.layers = nn.ParameterList(torch.randn(s, generator=generator) / s[1] ** 0.5 for s in sizes)
        self.schedule = NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100)), "epsilon")

    def forward(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, pooled: Tensor) -> Tensor:
        seen = torch.cat([noisy.flatten(1), timesteps[:, None] / 100, prompts.mean(dim=1), pooled], dim=1)
        return (torch.tanh(seen @ self.layers[0].T) @ self.layers[1].T).reshape(noisy.shape)


def policy_of(variant: str) -> Policy:
    """A LoRA on a small UNet for the variants of that name, else all of the small denoiser."""
    if "lora" not in variant:
        return FullPolicy(CaptionDenoiser())
    # They take seconds, which processes without a LoRA are spared.
    from tiny_unet import UNetDenoiser, tiny_unet

    from popalign_core.models.lora import add_lora

    denoiser = UNetDenoiser(tiny_unet(pooled=WIDTH))
    add_lora(denoiser.unet, 2, "attention", 5)
    if variant == "lora":
        return LoraPolicy(denoiser, denoiser.unet)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(denoiser).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return LoraPolicy(denoiser, denoiser.unet, reference_at="start")


def data_of() -> AlignmentData:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return AlignmentData.from_arrays(
        {
            "latent_means": normal(2 * PAIRS, *SHAPE),
            "latent_deviations": np.full((2 * PAIRS, *SHAPE), 0.1, np.float32),
            "prompt_embeddings": normal(CAPTIONS, 3, WIDTH),
            "pooled": normal(CAPTIONS, WIDTH),
            "empty_prompt_embedding": normal(3, WIDTH),
            "empty_pooled": normal(WIDTH),
            "winner": np.arange(PAIRS),
            "loser": np.arange(PAIRS, 2 * PAIRS),
            "caption": rng.integers(0, CAPTIONS, PAIRS),
            "weight": rng.uniform(0.5, 1.5, PAIRS).astype(np.float32),
            "population": np.repeat(np.arange(6), [3, 5, 4, 4, 2, 6]),
            "winner_caption": rng.integers(0, CAPTIONS, PAIRS),
            "loser_caption": rng.integers(-1, CAPTIONS, PAIRS),
        }
    )


def join_ranks(rank: int, world: int, folder: str) -> Any:
    """Joins a process to the others, with gloo; an accelerator."""
    from accelerate import Accelerator

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    return Accelerator(cpu=True)


def run_two(run_rank: Callable[[int, int, str], None], folder: Path, seconds: float = 100) -> None:
    """Runs it in two processes, as run_rank(rank, 2, folder), to their end."""
    spawned = multiprocessing.get_context("spawn")
    ranks = [spawned.Process(target=run_rank, args=(rank, 2, str(folder))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
        process.kill()
