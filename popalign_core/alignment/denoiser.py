"""What training needs of a text-to-image model: a denoiser and its noise schedule."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction"]


class Schedule(Protocol):
    """A forward process x_t = signal_t x + spread_t noise in discrete timesteps, and what a denoiser predicts of it."""

    def __len__(self) -> int:
        """Timesteps, from the least noise to the most."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (b, c, h, w) at timesteps (b,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect prediction would be, (b, c, h, w)."""
        ...

    def error_weights(self) -> Tensor:
        """Weight of the summed squared error of each step but the first in the variational bound, float64."""
        ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A variance-preserving forward process.

    alphas_cumprod: (timesteps,), strictly decreasing, inside (0, 1); the share of signal variance left. The last may be
    0 where the velocity is predicted.
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
        if self.prediction_type == "v_prediction":
            return velocity_weights(signal, 1 - signal)
        log_snr = torch.logit(signal)
        return torch.expm1(log_snr[:-1] - log_snr[1:]) / 2

    def _scales(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # Square roots before the cast: in half precision 1 - a loses the first timesteps altogether.
        signal = self.alphas_cumprod.to(latents.device)[timesteps].reshape(-1, 1, 1, 1)
        return signal.sqrt().to(latents.dtype), (1 - signal).sqrt().to(latents.dtype)


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """A rectified flow: a straight line from the image to the noise, whose velocity is predicted.

    sigmas: (timesteps,), strictly increasing, in (0, 1]; the share of noise. Source: Esser et al. 2024, "Scaling
    Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206), after Liu et al. 2022.
    """

    sigmas: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents (b, c, h, w) at timesteps (b,): (1 - sigma) latents + sigma noise."""
        sigmas = self.sigmas.to(latents.device)[timesteps].reshape(-1, 1, 1, 1)
        return (1 - sigmas).to(latents.dtype) * latents + sigmas.to(latents.dtype) * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:  # noqa: ARG002 - same at all of them
        """The velocity along the line, noise - latents, (b, c, h, w)."""
        return noise - latents

    def error_weights(self) -> Tensor:
        """Weight of the summed squared velocity error of each step in the variational bound, (timesteps - 1,), float64.

        Since noise = x_t + (1 - sigma) velocity, a velocity error is a noise error divided by 1 - sigma, and that is
        the signal's scale, as in a variance-preserving process. The first timestep has none, as there.
        """
        sigmas = self.sigmas.detach().cpu().double()
        return velocity_weights((1 - sigmas).square(), sigmas.square())


def velocity_weights(signal: Tensor, noise: Tensor) -> Tensor:
    """Weights of squared velocity errors in the variational bound, (timesteps - 1,).

    signal, noise: their variances by timestep, (timesteps,). It is signal(t) (SNR(t-1) / SNR(t) - 1) / 2, written so
    that a last timestep without any signal has a weight too.
    """
    snr = signal / noise
    return (snr[:-1] * noise[1:] - signal[1:]) / 2


class TrainableDenoiser(Protocol):
    """A conditional denoiser with parameters, as `torch.nn.Module` offers them."""

    @property
    def schedule(self) -> Schedule:
        """The forward process that it was trained on."""
        ...

    def __call__(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor, /) -> Tensor:
        """The prediction of the schedule's target.

        noisy: (b, c, h, w); timesteps: (b,) int64, positions in the schedule; prompt_embeddings: (b, tokens, d);
        pooled: (b, p), with p = 0 where a model takes none.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, frozen ones too."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters with stable names, the keys of a checkpoint."""
        ...
