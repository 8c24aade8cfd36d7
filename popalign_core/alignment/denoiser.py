"""What training needs of a text-to-image model: a denoiser and its noise schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving forward process.

    alphas_cumprod: (timesteps,), strictly decreasing, inside (0, 1); the share of signal variance left.
    prediction_type: what the denoiser predicts, the noise or the velocity (Salimans & Ho 2022).
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (b, c, h, w) at timesteps (b,). Source: Ho et al. 2020, eq. 4."""
        signal, spread = self._scales(latents, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect prediction would be, (b, c, h, w)."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(latents, timesteps)
        return signal * noise - spread * latents

    def error_weights(self) -> Tensor:
        """Weight of the summed squared error of each step in the variational bound, (timesteps - 1,), float64.

        For noise prediction it is (SNR(t-1) / SNR(t) - 1) / 2, with SNR = a / (1 - a) and a = alphas_cumprod; a
        velocity error is a noise error divided by sqrt(a), so its weight is a times that. The first timestep has none:
        it belongs to the reconstruction term. Source: Kingma et al. 2021, "Variational Diffusion Models", eq. 13-14.
        """
        signal = self.alphas_cumprod.detach().cpu().double()
        log_snr = torch.logit(signal)
        weights = torch.expm1(log_snr[:-1] - log_snr[1:]) / 2
        return weights if self.prediction_type == "epsilon" else weights * signal[1:]

    def _scales(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # Square roots before the cast: in half precision 1 - a loses the first timesteps altogether.
        signal = self.alphas_cumprod.to(latents.device)[timesteps].reshape(-1, 1, 1, 1)
        return signal.sqrt().to(latents.dtype), (1 - signal).sqrt().to(latents.dtype)


class TrainableDenoiser(Protocol):
    """A conditional denoiser with parameters, as `torch.nn.Module` offers them."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The forward process that it was trained on."""
        ...

    def __call__(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor, /) -> Tensor:
        """The prediction, in the schedule's prediction type.

        noisy: (b, c, h, w); timesteps: (b,) int64; prompt_embeddings: (b, tokens, d); pooled: (b, p).
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, frozen ones too."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with stable names, the keys of a checkpoint."""
        ...
