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
from popalign_core.alignment.sharding import all_whole, cut_like
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
    `spikes.spike_score`. start_gap: the largest beta |g| of this process's pairs in the first step, where policy and
    reference are one function and it should be 0; None where the first step was not taken here.
    """

    policy: Policy
    settings: AlignmentSettings
    optimizer: torch.optim.Optimizer
    step: int
    average: dict[str, Tensor] | None
    recent_losses: list[float] = field(default_factory=list[float])
    start_gap: float | None = None


def begin(policy: Policy, settings: AlignmentSettings) -> TrainingState:
    """The state before the first step. Raises: InvalidInput if the policy has nothing to train."""
    parameters = list(trainable_parameters(policy.denoiser).values())
    if not parameters:
        raise InvalidInput("the policy has no trainable parameters.")
    optimizer = make_optimizer(parameters, settings)
    average = copy_weights(policy.denoiser) if settings.ema_decay is not None else None
    return TrainingState(policy=policy, settings=settings, optimizer=optimizer, step=0, average=average)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A state as it is written: whole tensors, and facts. Those of a model that is not sharded are the live ones."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    average: dict[str, Tensor] | None
    facts: dict[str, object]


def take_snapshot(state: TrainingState, *, keep: bool = True) -> Snapshot:
    """All processes of a sharded training must call it, between two records of `train`. Raises: LostProcess.

    keep: False in one that only takes part, and writes nothing. The tensors are put together before any is written, so
    that a disk that fails the one that writes leaves no other waiting: 16 bytes a weight of its host's memory at most.
    """
    named = trainable_parameters(state.policy.denoiser)
    weights: dict[str, Tensor] = dict(named)
    return Snapshot(
        all_whole(weights, keep=keep),
        all_whole(optimizer_tensors(state.optimizer, named), keep=keep),
        None if state.average is None else all_whole(state.average, keep=keep),
        {"step": state.step, "settings": asdict(state.settings), "recent_losses": state.recent_losses},
    )


def save_state(state: TrainingState, folder: Path) -> None:
    """Write the state into an existing folder. The bytes depend on the state alone.

    Whoever owns the folder makes the commit atomic; call this between two records of `train`. Not of a sharded model
    in one process alone: see `take_snapshot`.
    """
    write_snapshot(take_snapshot(state), folder)


def write_snapshot(snapshot: Snapshot, folder: Path) -> None:
    """Write it into an existing folder. A sharded training leaves the same files as any other."""
    save_file(_contiguous(snapshot.weights), folder / WEIGHTS)
    save_file(_contiguous(snapshot.moments), folder / OPTIMIZER)
    if snapshot.average is not None:
        save_file(_contiguous(snapshot.average), folder / AVERAGE)
    (folder / STATE).write_text(json.dumps(snapshot.facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
    named = trainable_parameters(policy.denoiser)
    if average is not None:
        state.average = {n: cut_like(tensor, named[n]).to(named[n].device) for n, tensor in average.items()}
    restore_optimizer(state.optimizer, named, moments)
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
                f"{current.get(name)}. Go on with the old settings, start a new run, or remove that folder: "
                "the training then begins anew."
            )


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In the host's memory; what lies there as it should is not copied, as it may be many gigabytes."""
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        place = here.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory, as the 8-bit optimizer's tables do.
        found[name] = here.clone() if place in places else here
        places.add(place)
    return found
