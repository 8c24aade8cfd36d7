"""The processes that compute a step together: a thin layer over accelerate, which is optional."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from popalign_core.alignment.cache import Share
from popalign_core.errors import InvalidInput

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]


class Processes:
    """One process without an accelerator, its processes with one.

    Gradients are averaged here after the backward pass and the model is not wrapped, so that the policy stays the
    same object in every mode. Raises: InvalidInput for fp16.
    """

    def __init__(self, accelerator: "Accelerator | None" = None):
        if accelerator is not None and accelerator.mixed_precision == "fp16":
            raise InvalidInput("fp16 loses the small differences that the objective is made of; use bf16 or no.")
        self._accelerator = accelerator
        self.share = Share() if accelerator is None else Share(accelerator.process_index, accelerator.num_processes)

    def autocast(self) -> AbstractContextManager[None]:
        """The mixed precision of the forward passes."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

    def mean_over_pairs(self, local_means: Tensor, local_pairs: int, global_pairs: int) -> Tensor:
        """Means over the pairs of all processes from the means over this one's, any shape."""
        if self._accelerator is None:
            return local_means
        return self._reduce(local_means * (local_pairs / global_pairs), "sum")

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; every process must have the same parameters."""
        if self._accelerator is None or self.share.processes == 1:
            return
        for parameter in parameters:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self._reduce(gradient, "mean")

    def _reduce(self, values: Tensor, reduction: str) -> Tensor:
        if self._accelerator is None:
            return values
        reduced: Tensor = self._accelerator.reduce(values, reduction)  # pyright: ignore
        return reduced
