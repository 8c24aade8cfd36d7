"""The state of a training run, and its exact save and load."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from popalign_core.alignment.adapters import Policy, copy_weights, restore_weights, trainable_parameters
from popalign_core.alignment.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.errors import InvalidInput

WEIGHTS, OPTIMIZER, AVERAGE, STATE = (
    "policy.safetensors",
    "optimizer.safetensors",
    "average.safetensors",
    "state.json",
)


@dataclass(eq=False)
class TrainingState:
    """Everything that a step changes.

    step: finished steps. average: the moving average of the weights, if kept. recent_losses: the last ones, for
    `spikes.spike_score`.
    """

    policy: Policy
    settings: AlignmentSettings
    optimizer: torch.optim.Optimizer
    step: int
    average: dict[str, Tensor] | None
    recent_losses: list[float] = field(default_factory=list[float])


def begin(policy: Policy, settings: AlignmentSettings) -> TrainingState:
    """The state before the first step. Raises: InvalidInput if the policy has nothing to train."""
    parameters = list(trainable_parameters(policy.denoiser).values())
    if not parameters:
        raise InvalidInput("the policy has no trainable parameters.")
    optimizer = make_optimizer(parameters, settings)
    average = copy_weights(policy.denoiser) if settings.ema_decay is not None else None
    return TrainingState(policy=policy, settings=settings, optimizer=optimizer, step=0, average=average)


def save_state(state: TrainingState, folder: Path) -> None:
    """Write the state into an existing folder. The bytes depend on the state alone.

    Whoever owns the folder makes the commit atomic; call this between two records of `train`.
    """
    save_file(_contiguous(copy_weights(state.policy.denoiser)), folder / WEIGHTS)
    moments = optimizer_tensors(state.optimizer, trainable_parameters(state.policy.denoiser))
    save_file(_contiguous(moments), folder / OPTIMIZER)
    if state.average is not None:
        save_file(_contiguous(state.average), folder / AVERAGE)
    facts = {"step": state.step, "settings": asdict(state.settings), "recent_losses": state.recent_losses}
    (folder / STATE).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_state(policy: Policy, settings: AlignmentSettings, folder: Path) -> TrainingState:
    """The state saved in a folder, put into the policy.

    Raises: InvalidInput if the folder is incomplete or damaged, or of other settings or another model: resuming with
    other settings would give a run that neither of the two describes.
    """
    try:
        facts = json.loads((folder / STATE).read_text(encoding="utf-8"))
        weights, moments = load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER)
        average = load_file(folder / AVERAGE) if settings.ema_decay is not None else None
    except (OSError, ValueError, SafetensorError) as error:
        raise InvalidInput(f"the training checkpoint {folder} cannot be read: {error}.") from error
    _require_same_settings(facts["settings"], settings, folder)
    state = begin(policy, settings)
    restore_weights(policy.denoiser, weights)
    device = next(iter(policy.denoiser.parameters())).device
    if average is not None:
        state.average = {name: tensor.to(device) for name, tensor in average.items()}
    restore_optimizer(state.optimizer, trainable_parameters(policy.denoiser), moments)
    state.step, state.recent_losses = facts["step"], facts.get("recent_losses", [])
    return state


def _require_same_settings(saved: dict[str, object], settings: AlignmentSettings, folder: Path) -> None:
    current = json.loads(json.dumps(asdict(settings)))
    # A checkpoint from before a setting was there has its default.
    saved = {**json.loads(json.dumps(asdict(AlignmentSettings()))), **saved}
    # Where the learning rate does not depend on the steps, training may go on beyond what was first asked for.
    open_ended = settings.learning_rate_schedule == "constant" or settings.schedule_steps is not None
    free = {"steps"} if open_ended else set[str]()
    for name in sorted((current.keys() | saved.keys()) - free):
        if current.get(name) != saved.get(name):
            raise InvalidInput(
                f"the training checkpoint {folder} was made with {name} = {saved.get(name)}, now it is "
                f"{current.get(name)}. Go on with the old settings or start a new run."
            )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Copies: safetensors refuses tensors that share memory, as the 8-bit optimizer's tables do.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
