"""The training loop: one record a step, nothing logged, nothing saved; the caller does both between two records."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from popalign_core.alignment.accumulation import accumulate_gradient
from popalign_core.alignment.adapters import Policy, trainable_parameters
from popalign_core.alignment.cache import AlignmentData, draw_batch
from popalign_core.alignment.checkpoint import TrainingState, begin, load_state
from popalign_core.alignment.exchange import exchanging
from popalign_core.alignment.passes import Autocast
from popalign_core.alignment.processes import Processes, require_shares
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.sharding import is_sharded, whole
from popalign_core.alignment.spikes import WINDOW, spike_score
from popalign_core.errors import LossSpike, TrainingDiverged

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]


# Of beta times g where policy and reference are one function: it moves a pair's weight by half a percent.
START_ROUNDING = 0.01


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
    Raises: TrainingDiverged before the update of a step whose loss or gradient is not finite, LossSpike before that of
    one whose loss jumps, where the settings look for it; InvalidInput; LostProcess.
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
    state.optimizer.zero_grad(set_to_none=True)
    autocast = autocast_of(state, device, processes)
    with exchanging():
        found = accumulate_gradient(state.policy, batch, settings, processes, autocast)
        norm = clip_gradient(state, processes)

    winner, loser = found.errors.log_ratios()
    local = torch.stack([found.loss, found.errors.implicit_accuracy(), winner.mean(), loser.mean()])
    means: list[float] = processes.mean_over_pairs(local, len(winner), batch.global_pairs).tolist()  # pyright: ignore
    _require_sound(state, means[0], norm)
    if state.step == 0 and settings.objective != "sft":  # that has no g
        state.start_gap = settings.beta * torch.cat([winner, loser]).abs().max().item()
    rate = settings.learning_rate_at(state.step)
    update_weights(state, rate)
    state.recent_losses = [*state.recent_losses, means[0]][-WINDOW:]
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


def autocast_of(state: TrainingState, device: torch.device, processes: Processes) -> Autocast:
    """Gives the context of every pass through a denoiser: bfloat16 where the settings are in mixed precision."""
    if not state.settings.mixed_precision:
        return processes.autocast
    # It would keep its rounded copies of sharded weights, gathered for a moment, for the whole pass.
    cached = not is_sharded(state.policy.denoiser.parameters())
    return lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=cached)


def _require_sound(state: TrainingState, loss: float, norm: float) -> None:
    """Raises before the update, in all processes alike: TrainingDiverged, LossSpike."""
    step, limit = state.step + 1, state.settings.spike_limit
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.optimizer.zero_grad(set_to_none=True)
        raise TrainingDiverged(step=step, loss=norm if math.isfinite(loss) else loss)
    score = spike_score(state.recent_losses, loss) if limit is not None else 0.0
    if limit is not None and score > limit:
        state.optimizer.zero_grad(set_to_none=True)
        raise LossSpike(step=step, loss=loss, score=score, limit=limit)


def clip_gradient(state: TrainingState, processes: Processes) -> float:
    """Average over processes, clip, and return the norm before clipping, that of all the parts of a sharded one."""
    parameters = list(trainable_parameters(state.policy.denoiser).values())
    processes.average_gradients(parameters)
    limit = state.settings.max_gradient_norm
    return whole(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)).item()


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
    named = trainable_parameters(state.policy.denoiser)
    # One kernel for many tensors where there is a GPU; the same bits as one after another.
    torch._foreach_lerp_([state.average[name] for name in named], list(named.values()), 1 - decay)  # pyright: ignore
