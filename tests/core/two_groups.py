"""A denoiser of two groups whose true shares are known, and pairs to train it on."""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.denoiser import NoiseSchedule, PredictionType
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord

SHAPE = (1, 2, 2)
SPREAD = 0.3
SETTINGS = AlignmentSettings(steps=6, pairs_per_step=8, learning_rate=0.05, beta=4.0, weight_decay=0.0, seed=3)
EMA_SETTINGS = replace(SETTINGS, ema_decay=0.9, learning_rate_schedule="cosine", warmup_steps=2)


class TwoGroupDenoiser(nn.Module):
    """The optimal denoiser of two groups, N(-1, SPREAD^2) and N(+1, SPREAD^2) in every element.

    Its two parameters are the groups' logits, so that its true shares are known: their softmax.
    """

    def __init__(self, second_share: float, prediction_type: PredictionType = "epsilon"):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, math.log(second_share / (1 - second_share))]))
        self.schedule = NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100)), prediction_type)

    def forward(self, noisy: Tensor, timesteps: Tensor, _prompts: Tensor, _pooled: Tensor) -> Tensor:
        signal = self.schedule.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        variance = signal * SPREAD**2 + 1 - signal
        evidence = (2 * signal.sqrt() * noisy / variance).sum(dim=(1, 2, 3), keepdim=True)
        mean = torch.tanh((self.logits[1] - self.logits[0] + evidence) / 2)
        clean = mean + signal.sqrt() * SPREAD**2 / variance * (noisy - signal.sqrt() * mean)
        noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
        if self.schedule.prediction_type == "epsilon":
            return noise
        return signal.sqrt() * noise - (1 - signal).sqrt() * clean

    def disparity(self) -> float:
        """L2 distance of the true shares from even ones."""
        return (self.logits.detach().softmax(0) - 0.5).norm().item()


def samples_of(second_share: float, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    group = np.where(np.arange(count) < round(second_share * count), 1.0, -1.0)
    return (group[:, None, None, None] + SPREAD * rng.standard_normal((count, *SHAPE))).astype(np.float32)


def data_of(pairs: int = 40, populations: int = 4, loser_share: float = 0.9, **changes: np.ndarray) -> AlignmentData:
    arrays = {
        "latent_means": np.concatenate([samples_of(0.5, pairs, 0), samples_of(loser_share, pairs, 1)]),
        "prompt_embeddings": np.ones((1, 2, 3), np.float16),
        "pooled": np.ones((1, 3), np.float16),
        "empty_prompt_embedding": np.zeros((2, 3), np.float16),
        "empty_pooled": np.zeros(3, np.float16),
        "winner": np.arange(pairs),
        "loser": np.arange(pairs, 2 * pairs),
        "caption": np.zeros(pairs, np.int64),
        "weight": np.ones(pairs, np.float32),
        "population": np.arange(pairs) % populations,
    }
    return AlignmentData.from_arrays(arrays | changes)


def without_time(records: list[StepRecord]) -> list[StepRecord]:
    return [replace(record, seconds=0.0) for record in records]
