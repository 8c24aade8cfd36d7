"""Denoising as a chain of Gaussian steps, each with a density: what a policy gradient needs and fast samplers lack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from popalign_core.alignment.denoiser import NoiseSchedule, TrainableDenoiser


@dataclass(frozen=True, eq=False)
class Conditions:
    """Captions of a batch and the empty one: (b, tokens, d) and (b, p), (tokens, d) and (p,)."""

    prompt_embeddings: Tensor
    pooled: Tensor
    empty_prompt_embedding: Tensor
    empty_pooled: Tensor

    def rows(self, index: Tensor) -> "Conditions":
        """Those of some images, repeats allowed."""
        rows = self.prompt_embeddings[index], self.pooled[index]
        return Conditions(*rows, self.empty_prompt_embedding, self.empty_pooled)


@dataclass(frozen=True, eq=False)
class DenoisingChain:
    """DDIM with eta = 1 (Song et al. 2021, eq. 12 and 16), the policy of DDPO: x_s ~ N(mean(x_t), deviation^2).

    steps: of the chain, at equal distances and from the last timestep on. guidance_scale: of classifier-free guidance,
    which is part of the policy; 1 = none. The last step, to the image, has no noise and so no density.
    """

    schedule: NoiseSchedule
    steps: int
    guidance_scale: float

    @property
    def timesteps(self) -> Tensor:
        """Timestep at which each step starts, (steps,), int64, falling."""
        total = len(self.schedule)
        return torch.tensor([round(total * (self.steps - k) / self.steps) - 1 for k in range(self.steps)])

    def predict(self, denoiser: TrainableDenoiser, states: Tensor, places: Tensor, conditions: Conditions) -> Tensor:
        """The guided prediction for states (b, c, h, w) before the steps of those places, (b,)."""
        timesteps = self.timesteps[places].to(states.device)
        if self.guidance_scale == 1:
            return denoiser(states, timesteps, conditions.prompt_embeddings, conditions.pooled).float()
        count = len(states)
        context = torch.cat([conditions.empty_prompt_embedding.expand(count, -1, -1), conditions.prompt_embeddings])
        pooled = torch.cat([conditions.empty_pooled.expand(count, -1), conditions.pooled])
        both = denoiser(torch.cat([states] * 2), torch.cat([timesteps] * 2), context, pooled).float()
        empty, named = both.chunk(2)
        return empty + self.guidance_scale * (named - empty)

    def step(self, prediction: Tensor, states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, c, h, w) and deviation (b, 1, 1, 1) of the next states; the deviation of the last step is 0."""
        before, after = (signal.reshape(-1, 1, 1, 1).to(states.device) for signal in self._signals(places))
        if self.schedule.prediction_type == "epsilon":
            noise = prediction
            clean = (states - (1 - before).sqrt() * noise) / before.sqrt()
        else:
            clean = before.sqrt() * states - (1 - before).sqrt() * prediction
            noise = (1 - before).sqrt() * states + before.sqrt() * prediction
        variance = (1 - after) / (1 - before) * (1 - before / after)
        mean = after.sqrt() * clean + (1 - after - variance).clamp(min=0).sqrt() * noise
        return mean.float(), variance.sqrt().float()

    def _signals(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Share of signal variance before and after the steps of those places, each (b,), float64; 1 after the last."""
        signals = self.schedule.alphas_cumprod.double().cpu()[self.timesteps]
        return signals[places.cpu()], torch.cat([signals[1:], torch.ones(1, dtype=torch.float64)])[places.cpu()]

    @torch.no_grad()
    def roll_out(
        self, denoiser: TrainableDenoiser, conditions: Conditions, seeds: Sequence[int], shape: tuple[int, ...]
    ) -> Tensor:
        """States before each step and the image's latents at last, (steps + 1, images, c, h, w).

        seeds: one an image, for its initial noise and the noise of its steps, so that an image does not depend on its
        neighbours but by rounding. shape: (c, h, w).
        """
        device = conditions.pooled.device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> Tensor:
            return torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)

        states = [noise()]
        for place in range(self.steps):
            places = torch.full((len(seeds),), place)
            prediction = self.predict(denoiser, states[-1], places, conditions)
            mean, deviation = self.step(prediction, states[-1], places)
            states.append(mean if place == self.steps - 1 else mean + deviation * noise())
        return torch.stack(states)


def step_log_density(following: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Log-density of the states that followed, (b,), in nats a latent element and up to a constant.

    The mean over elements, as in DDPO's code; the sum is the same objective at another learning rate.
    """
    return -((following - mean) / deviation).square().flatten(1).mean(dim=1) / 2
