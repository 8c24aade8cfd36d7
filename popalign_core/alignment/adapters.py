"""Policies: a trainable denoiser together with the frozen reference that it is compared with."""

import copy
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from popalign_core.alignment.denoiser import TrainableDenoiser
from popalign_core.alignment.sharding import cut_like
from popalign_core.errors import InvalidInput

TrainablePart = Literal["all", "conditioning"]
# Where the caption enters an SDXL UNet, in diffusers' naming: cross-attention, and the pooled embedding beside the
# timestep. What it is in other networks: `models.families`.
_CONDITIONING = (".attn2.", ".add_embedding.")


class Policy(Protocol):
    """What is trained, and what it is compared with."""

    @property
    def denoiser(self) -> TrainableDenoiser:
        """The model being trained; parameters that need no gradient are frozen."""
        ...

    @property
    def compiled(self) -> bool:
        """Whether its passes are compiled: those of the reference are then of the same graph, see `measured_mode`."""
        ...

    def reference(self) -> AbstractContextManager[TrainableDenoiser]:
        """The reference, usable inside the context only. Do not use the policy there: they may be one model."""
        ...


class AdapterSwitch(Protocol):
    """A model whose adapters can be switched off and on, as every diffusers model with a peft adapter."""

    def disable_adapters(self) -> None:
        """Behave as the base model."""
        ...

    def enable_adapters(self) -> None:
        """Behave as the adapted model, its adapters trainable."""
        ...


class FullPolicy:
    """The weights themselves are trained; the reference is a frozen copy, taken here, that stays on the device.

    Two models in memory. mixed_precision: every pass runs under bfloat16 autocast, which rounds matrices and kernels to
    bfloat16. The copy then keeps those rounded: half the memory, the same function to the last bit, and g is 0 at the
    first step. Without autocast such a copy would be another function. compiled: the copy keeps float32 all the same,
    or it would be compiled to another graph than the policy.
    """

    def __init__(
        self,
        denoiser: TrainableDenoiser,
        trainable: TrainablePart = "all",
        conditioning: Sequence[str] = _CONDITIONING,
        *,
        mixed_precision: bool = False,
        compiled: bool = False,
    ):
        """conditioning: see `select_trainable`."""
        self.denoiser = denoiser
        self.compiled = compiled
        select_trainable(denoiser, trainable, conditioning)
        # The copy keeps each weight's `requires_grad`, though it is only run without gradients: torch multiplies by
        # other kernels where the weight needs none (see its `should_fold`), and g would be rounding, not 0, at first.
        self._reference = copy.deepcopy(denoiser)
        for parameter in self._reference.parameters():
            # Scales of normalizations are no matrices: autocast computes with them as they are.
            if mixed_precision and not compiled and parameter.ndim > 1:
                parameter.data = parameter.data.to(torch.bfloat16)

    @contextmanager
    def reference(self) -> Generator[TrainableDenoiser]:
        """The frozen copy."""
        yield self._reference


class LoraPolicy:
    """Only adapters are trained; the reference is the same model: one model in memory.

    reference_at: "base", the model with its adapters off; "start", with the adapters as they are now, which is what a
    further round compares with. For a new adapter the two are the same function. compiled: "start" always, since a
    model with its adapters off is another graph, which rounds in other places.
    """

    def __init__(
        self,
        denoiser: TrainableDenoiser,
        adapters: AdapterSwitch,
        reference_at: Literal["base", "start"] = "base",
        *,
        compiled: bool = False,
    ):
        self.denoiser = denoiser
        self.compiled = compiled
        self._adapters = adapters
        self._start = copy_weights(denoiser) if compiled or reference_at == "start" else None

    @contextmanager
    def reference(self) -> Generator[TrainableDenoiser]:
        """The same denoiser, its adapters off or as they were."""
        inside = reference_mode(self._adapters)
        if self._start is not None:
            inside = substituted_weights(self.denoiser, self._start)
        with inside:
            yield self.denoiser


def measured_mode(policy: Policy) -> AbstractContextManager[None]:
    """For passes that are measured and not differentiated: without gradients, where nothing is compiled.

    A graph without gradients is another one than that with them, and code generated from it rounds in other places: in
    bfloat16, times beta, by as much as what is to be learnt. What comes of such a pass must be detached.
    """
    return torch.enable_grad() if policy.compiled else torch.no_grad()


@contextmanager
def reference_mode(model: AdapterSwitch) -> Generator[None]:
    """Inside, the model is its base model; afterwards it is the adapted one again, whatever happened."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


def select_trainable(
    denoiser: TrainableDenoiser, part: TrainablePart, conditioning: Sequence[str] = _CONDITIONING
) -> int:
    """Make that part of the denoiser trainable and freeze the rest; returns the number of trainable elements.

    "conditioning": the layers through which the caption enters; pieces of their parameters' names.
    Raises: InvalidInput if nothing is left to train.
    """
    elements = 0
    for name, parameter in denoiser.named_parameters():
        chosen = part == "all" or any(layer in f".{name}." for layer in conditioning)
        parameter.requires_grad_(chosen)
        elements += parameter.numel() if chosen else 0
    if elements == 0:
        raise InvalidInput(f"the model has no parameters of the part {part!r} to train.")
    return elements


def trainable_parameters(denoiser: TrainableDenoiser) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name, in the model's order."""
    return {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}


def copy_weights(denoiser: TrainableDenoiser) -> dict[str, Tensor]:
    """A copy of the trainable weights, by name: small for LoRA, the whole model else. Of sharded ones the parts."""
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(denoiser).items()}


@torch.no_grad()
def restore_weights(denoiser: TrainableDenoiser, weights: dict[str, Tensor]) -> None:
    """Write back weights from `copy_weights`, or whole ones. Raises: InvalidInput if they are of other parameters."""
    parameters = trainable_parameters(denoiser)
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise InvalidInput(f"the weights are of another model or another trainable part; first difference: {odd[0]}.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise InvalidInput(f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}.")
        parameter.copy_(cut_like(weights[name], parameter))


@contextmanager
def substituted_weights(denoiser: TrainableDenoiser, weights: dict[str, Tensor]) -> Generator[None]:
    """Inside, the denoiser has those weights (an average, an earlier checkpoint); afterwards its own again."""
    own = copy_weights(denoiser)
    restore_weights(denoiser, weights)
    try:
        yield
    finally:
        restore_weights(denoiser, own)
