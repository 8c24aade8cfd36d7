"""Plain values that fix a training run: with the data and the seed they decide every step."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from popalign_core.alignment.reward import RewardSettings
from popalign_core.errors import InvalidInput, UnknownName

Objective = Literal["popalign", "popalign_exact", "dpo", "sft", "reward"]
LearningRateSchedule = Literal["constant", "cosine"]
TimestepSampling = Literal["uniform", "stratified"]
Optimizer = Literal["adamw", "adamw_8bit"]


@dataclass(frozen=True)
class AlignmentSettings:
    """Settings of one training run.

    steps: optimizer steps in all. pairs_per_step: over all processes together (for "popalign_exact": as many whole
    populations as fit, at least one). warmup_steps: linear warm-up. beta: on the scale of the mean squared error per
    latent element, as in the paper's code; see `objective.natural_beta`. anchor_weight: weight of the mean winner
    error added to the loss. preserve_weight: weight of the squared distance between the predictions of policy and
    reference for images under the captions that name their groups, which keeps such captions obeyed.
    caption_dropout: share of pairs trained under the empty caption. caption_mixing: each caption's embedding is moved
    up to this share of the way to another one's. max_gradient_norm, ema_decay: None switches them off.
    winner_preserving: shrink the push away from a loser so that the winner's error does not rise to first order.
    schedule_steps: steps at which the learning rate schedule ends, None for `steps`. first_timestep: images with less
    noise than at this one are not trained on. micro_batch: pairs that a process passes through the model at once, None
    for all of its own; of "reward" images where it draws and steps of images where it learns, None for a whole group.
    mixed_precision: passes in bfloat16, weights and optimizer in float32. spike_limit: see `spikes.spike_score`; None
    switches it off.
    reward: for the objective "reward" alone.

    Raises: UnknownName, InvalidInput.
    """

    objective: Objective = "popalign"
    steps: int = 100
    pairs_per_step: int = 32
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    beta: float = 500.0
    anchor_weight: float = 0.0
    preserve_weight: float = 0.0
    caption_dropout: float = 0.1
    caption_mixing: float = 0.0
    max_gradient_norm: float | None = 1.0
    weight_decay: float = 0.01
    ema_decay: float | None = None
    winner_preserving: bool = False
    learning_rate_schedule: LearningRateSchedule = "constant"
    schedule_steps: int | None = None
    timestep_sampling: TimestepSampling = "uniform"
    first_timestep: int = 0
    micro_batch: int | None = None
    mixed_precision: bool = False
    optimizer: Optimizer = "adamw"
    spike_limit: float | None = None
    seed: int = 0
    reward: RewardSettings | None = None

    def __post_init__(self) -> None:
        _require_known("objective", self.objective, get_args(Objective))
        _require_known("learning rate schedule", self.learning_rate_schedule, get_args(LearningRateSchedule))
        _require_known("timestep sampling", self.timestep_sampling, get_args(TimestepSampling))
        _require_known("optimizer", self.optimizer, get_args(Optimizer))
        _require_positive("steps", self.steps)
        _require_positive("pairs_per_step", self.pairs_per_step)
        _require_positive("learning_rate", self.learning_rate)
        _require_positive("schedule_steps", 1 if self.schedule_steps is None else self.schedule_steps)
        _require_positive("micro_batch", 1 if self.micro_batch is None else self.micro_batch)
        _require_positive("spike_limit", 1 if self.spike_limit is None else self.spike_limit)
        _require_positive("beta", self.beta)
        _require_positive("max_gradient_norm", 1 if self.max_gradient_norm is None else self.max_gradient_norm)
        _require_within("warmup_steps", self.warmup_steps, 0, math.inf)
        _require_within("anchor_weight", self.anchor_weight, 0, math.inf)
        _require_within("preserve_weight", self.preserve_weight, 0, math.inf)
        _require_within("weight_decay", self.weight_decay, 0, math.inf)
        _require_within("caption_dropout", self.caption_dropout, 0, 1)
        _require_within("caption_mixing", self.caption_mixing, 0, 1)
        _require_within("ema_decay", 0 if self.ema_decay is None else self.ema_decay, 0, 1)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        steps = self.steps if self.schedule_steps is None else self.schedule_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return self.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _require_known(kind: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise UnknownName(kind=kind, got=got, known=list(known))


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidInput(f"alignment.{name} is {value}, expected a number above 0.")


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidInput(f"alignment.{name} is {value}, expected a number from {low} to {high}.")
