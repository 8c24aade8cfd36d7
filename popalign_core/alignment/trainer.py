"""The training loop: one record a step, nothing logged, nothing saved; the caller does both between two records."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from popalign_core.alignment.adapters import Policy, trainable_parameters
from popalign_core.alignment.cache import AlignmentData, PairBatch, draw_batch
from popalign_core.alignment.checkpoint import TrainingState, begin, load_state
from popalign_core.alignment.objective import DenoisingErrors, alignment_loss, batch_baseline
from popalign_core.alignment.processes import Processes, require_shares
from popalign_core.alignment.safeguard import preserve_winners
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.errors import TrainingDiverged

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all processes.

    step: finished steps, from 1. loss: with the anchor and with what preserves named captions. implicit_accuracy:
    share of pairs whose winner gained more on the reference than its loser. winner_margin, loser_margin: mean g, in
    units of mean squared error (see `objective`). gradient_norm: before clipping. seconds: wall time, drawing the
    batch included. A policy gradient has no pairs (0) and no margins; it alone has reward, the mean over the images,
    drawn, their number, and unknown, those whose group could not be told on some axis.
    """

    step: int
    loss: float
    implicit_accuracy: float | None
    winner_margin: float | None
    loser_margin: float | None
    gradient_norm: float
    learning_rate: float
    pairs: int
    seconds: float
    reward: float | None = None
    drawn: int | None = None
    unknown: int | None = None

    @property
    def images_per_second(self) -> float:
        """Winners and losers together, over all processes; of a policy gradient the images drawn."""
        return (self.drawn or 2 * self.pairs) / self.seconds


@dataclass(frozen=True, eq=False)
class Residuals:
    """Predictions minus targets, each (pairs, c, h, w), float32."""

    winner: Tensor
    loser: Tensor


def train(
    policy: Policy,
    data: AlignmentData,
    settings: AlignmentSettings,
    *,
    state: TrainingState | None = None,
    resume_from: Path | None = None,
    accelerator: "Accelerator | None" = None,
) -> Iterator[StepRecord]:
    """Train the policy in place, up to `settings.steps` steps; yields one record after each.

    state: from `begin` or `load_state`, for a caller that wants to save it between records or stop early; its policy
    and settings must be the given ones. resume_from: a folder of `save_state`, for one that does not. accelerator:
    gives the autocast and the exchange between processes; the policy must be on its device. None: one process, the
    policy's own precision.
    Raises: TrainingDiverged before the update of a step whose loss or gradient is not finite; InvalidInput;
    LostProcess.
    """
    processes = Processes(accelerator)
    if state is None:
        state = begin(policy, settings) if resume_from is None else load_state(policy, settings, resume_from)
    require_shares(data, settings, state.step, processes.share)
    while state.step < settings.steps:
        yield _advance(state, data, processes)


def _advance(state: TrainingState, data: AlignmentData, processes: Processes) -> StepRecord:
    """One step. The state changes only if the step is sound."""
    started = time.perf_counter()
    denoiser, settings = state.policy.denoiser, state.settings
    device = next(iter(denoiser.parameters())).device
    batch = draw_batch(data, settings, state.step, len(denoiser.schedule), device, processes.share)
    with processes.autocast():
        errors, residuals = measure_errors(state.policy, batch)
    loss, surrogate = _weigh(errors, residuals, batch, settings, processes)
    state.optimizer.zero_grad(set_to_none=True)
    surrogate.backward()  # pyright: ignore[reportUnknownMemberType]
    norm = clip_gradient(state, processes)

    winner, loser = errors.log_ratios()
    accuracy = errors.implicit_accuracy()
    local = torch.stack([loss.detach(), accuracy, winner.detach().mean(), loser.detach().mean()])
    means: list[float] = processes.mean_over_pairs(local, len(winner), batch.global_pairs).tolist()  # pyright: ignore
    if not (math.isfinite(means[0]) and math.isfinite(norm)):
        state.optimizer.zero_grad(set_to_none=True)
        raise TrainingDiverged(step=state.step + 1, loss=norm if math.isfinite(means[0]) else means[0])
    rate = settings.learning_rate_at(state.step)
    update_weights(state, rate)
    return StepRecord(
        step=state.step,
        loss=means[0],
        implicit_accuracy=means[1],
        winner_margin=means[2],
        loser_margin=means[3],
        gradient_norm=norm,
        learning_rate=rate,
        pairs=batch.global_pairs,
        seconds=time.perf_counter() - started,
    )


def measure_errors(policy: Policy, batch: PairBatch) -> tuple[DenoisingErrors, Residuals]:
    """Errors of policy and reference on winners and losers, in one forward pass each; and the policy's residuals.

    Where the batch has named captions, one of each pair goes through once more under its own, for `named_drift`.
    """
    schedule, pairs = policy.denoiser.schedule, len(batch.winner_latents)
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
    noisy, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)

    # The reference first: switching adapters off marks them as not trainable, which must not happen to a live graph.
    with policy.reference() as reference, torch.no_grad():
        reference_residuals = reference(noisy, timesteps, *conditions).float() - target
    residuals = policy.denoiser(noisy, timesteps, *conditions).float() - target
    errors, reference_errors = (each.square().flatten(1).mean(dim=1) for each in (residuals, reference_residuals))
    drift = None
    if len(clean) == 3:
        # One target on both sides: the residuals' difference is that of the predictions.
        drift = (residuals - reference_residuals)[2 * pairs :].square().flatten(1).mean(dim=1)
    win, lose = slice(pairs), slice(pairs, 2 * pairs)
    measured = DenoisingErrors(errors[win], errors[lose], reference_errors[win], reference_errors[lose], drift)
    return measured, Residuals(residuals.detach()[win], residuals.detach()[lose])


def _weigh(
    errors: DenoisingErrors, residuals: Residuals, batch: PairBatch, settings: AlignmentSettings, processes: Processes
) -> tuple[Tensor, Tensor]:
    """The loss of this process's pairs, and what to differentiate so that gradients average over processes."""
    pairs = len(errors.policy_winner)
    loss = alignment_loss(
        errors,
        batch.labels,
        objective=settings.objective,
        beta=settings.beta,
        anchor_weight=settings.anchor_weight,
        baseline=processes.mean_over_pairs(batch_baseline(errors), pairs, batch.global_pairs),
    )
    surrogate = loss
    if settings.winner_preserving:
        surrogate, _ = preserve_winners(loss, errors, residuals.winner, residuals.loser)
    if errors.named_drift is not None:
        preserved = settings.preserve_weight * errors.named_drift.mean()
        loss, surrogate = loss + preserved, surrogate + preserved
    # Shares may differ in size; the mean over processes must still be the mean over pairs.
    return loss, surrogate * (pairs * processes.share.processes / batch.global_pairs)


def clip_gradient(state: TrainingState, processes: Processes) -> float:
    """Average over processes, clip, and return the norm before clipping."""
    parameters = list(trainable_parameters(state.policy.denoiser).values())
    processes.average_gradients(parameters)
    limit = state.settings.max_gradient_norm
    return torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit).item()


@torch.no_grad()
def update_weights(state: TrainingState, learning_rate: float) -> None:
    """One step of the optimizer, and of the moving average if there is one."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    state.step += 1
    decay = state.settings.ema_decay
    if state.average is None or decay is None:
        return
    # Early on a shorter memory, or the average would keep the starting point for 1 / (1 - decay) steps.
    decay = min(decay, (1 + state.step) / (10 + state.step))
    for name, parameter in trainable_parameters(state.policy.denoiser).items():
        state.average[name].lerp_(parameter, 1 - decay)
