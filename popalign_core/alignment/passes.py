"""Forward passes of policy and reference over a batch of pairs, and their errors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from popalign_core.alignment.adapters import Policy, measured_mode
from popalign_core.alignment.cache import PairBatch
from popalign_core.alignment.denoiser import Schedule
from popalign_core.alignment.objective import DenoisingErrors

# A new one for every pass: autocast keeps the weights it has cast, and the policy's may change in between.
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Residuals:
    """Predictions minus targets, each (pairs, c, h, w), float32, without a gradient."""

    winner: Tensor
    loser: Tensor


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Winners, losers and named images, one below the other; `pairs` rows of each."""

    noisy: Tensor
    timesteps: Tensor
    conditions: tuple[Tensor, Tensor]
    target: Tensor
    pairs: int


def measure_errors(
    policy: Policy, batch: PairBatch, autocast: Autocast = nullcontext
) -> tuple[DenoisingErrors, Residuals]:
    """Errors of policy and reference on winners and losers, in one forward pass each; and the policy's residuals.

    Where the batch has named captions, one of each pair goes through once more under its own, for `named_drift`.
    """
    inputs = _inputs(batch, policy.denoiser.schedule)
    return measure_policy(policy, batch, reference_residuals(policy, batch, autocast, inputs), autocast, inputs)


def reference_residuals(policy: Policy, batch: PairBatch, autocast: Autocast, inputs: _Inputs | None = None) -> Tensor:
    """The reference's predictions minus targets, (rows, c, h, w), of winners, losers and named images in turn."""
    found = inputs or _inputs(batch, policy.denoiser.schedule)
    # Before the policy's pass: switching adapters off marks them as not trainable, and a live graph must not see that.
    with policy.reference() as reference, measured_mode(policy), autocast():
        return reference(found.noisy, found.timesteps, *found.conditions).detach().float() - found.target


def measure_policy(
    policy: Policy, batch: PairBatch, reference: Tensor, autocast: Autocast, inputs: _Inputs | None = None
) -> tuple[DenoisingErrors, Residuals]:
    """As `measure_errors`, with the reference's residuals known."""
    found = inputs or _inputs(batch, policy.denoiser.schedule)
    pairs = found.pairs
    with autocast():
        predictions = policy.denoiser(found.noisy, found.timesteps, *found.conditions)
    residuals = predictions.float() - found.target
    errors, reference_errors = (each.square().flatten(1).mean(dim=1) for each in (residuals, reference))
    drift = None
    if batch.named is not None:
        # One target on both sides: the residuals' difference is that of the predictions.
        drift = (residuals - reference)[2 * pairs :].square().flatten(1).mean(dim=1)
    win, lose = slice(pairs), slice(pairs, 2 * pairs)
    measured = DenoisingErrors(errors[win], errors[lose], reference_errors[win], reference_errors[lose], drift)
    return measured, Residuals(residuals.detach()[win], residuals.detach()[lose])


def _inputs(batch: PairBatch, schedule: Schedule) -> _Inputs:
    clean, embeddings, pooled = (
        [batch.winner_latents, batch.loser_latents],
        [batch.prompt_embeddings] * 2,
        [batch.pooled] * 2,
    )
    if batch.named is not None:
        clean.append(batch.named.latents)
        embeddings.append(batch.named.prompt_embeddings)
        pooled.append(batch.named.pooled)
    latents, conditions = torch.cat(clean), (torch.cat(embeddings), torch.cat(pooled))
    noise, timesteps = torch.cat([batch.noise] * len(clean)), torch.cat([batch.timesteps] * len(clean))
    return _Inputs(
        schedule.add_noise(latents, noise, timesteps),
        timesteps,
        conditions,
        schedule.target(latents, noise, timesteps),
        len(batch.winner_latents),
    )
