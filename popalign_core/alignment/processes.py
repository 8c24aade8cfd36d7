"""The processes that compute a step together: a thin layer over accelerate, which is optional."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from popalign_core.alignment.cache import AlignmentData, Share, order_pairs
from popalign_core.alignment.exchange import exchanged
from popalign_core.alignment.objective import number_populations
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.sharding import is_part
from popalign_core.errors import InvalidInput

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

TEXT_BYTES = 16384
# Small gradients travel together: a message costs more than its first bytes.
BUCKET_ELEMENTS = 8_000_000


class Processes:
    """One process without an accelerator, its processes with one.

    Gradients are averaged here after the backward pass and the model is not wrapped, so that the policy stays the
    same object in every mode. Raises: InvalidInput for fp16; every method LostProcess where another one is gone.
    """

    def __init__(self, accelerator: "Accelerator | None" = None):
        if accelerator is not None and accelerator.mixed_precision == "fp16":
            raise InvalidInput("fp16 loses the small differences that the objective is made of; use bf16 or no.")
        self._accelerator = accelerator
        self.share = Share() if accelerator is None else Share(accelerator.process_index, accelerator.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this one does what is to be done once: what is written to the disk."""
        return self.share.rank == 0

    def autocast(self) -> AbstractContextManager[None]:
        """The mixed precision of the forward passes."""
        return nullcontext() if self._accelerator is None else self._accelerator.autocast()

    def mean_over_pairs(self, local_means: Tensor, local_pairs: int, global_pairs: int) -> Tensor:
        """Means over the pairs of all processes from the means over this one's, any shape."""
        if self._accelerator is None:
            return local_means
        return self._reduce(local_means * (local_pairs / global_pairs), "sum")

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; every process must have the same parameters.

        Gradients of sharded ones were averaged in the backward pass.
        """
        if self._accelerator is None or self.share.processes == 1:
            return
        for bucket in _buckets([parameter for parameter in parameters if not is_part(parameter)]):
            for parameter in bucket:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            means = self._reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            start = 0
            for gradient in gradients:
                gradient.copy_(means[start : start + gradient.numel()].view(gradient.shape))
                start += gradient.numel()

    def gather_texts(self, text: str) -> list[str]:
        """What each process says, by rank; waits for all of them. Longer than TEXT_BYTES in UTF-8 is cut."""
        if self._accelerator is None:
            return [text]
        said = text.encode()[:TEXT_BYTES]
        row = torch.zeros(1, TEXT_BYTES, dtype=torch.uint8)
        row[0, : len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else row[0, :0]
        accelerator, sent = self._accelerator, row.to(self._accelerator.device)
        rows: Tensor = exchanged(lambda: accelerator.gather(sent))  # pyright: ignore
        return [row.numpy().tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows.cpu()]

    def _reduce(self, values: Tensor, reduction: str) -> Tensor:
        accelerator = self._accelerator
        if accelerator is None:
            return values
        return exchanged(lambda: accelerator.reduce(values, reduction))  # pyright: ignore


def require_shares(data: AlignmentData, settings: AlignmentSettings, first_step: int, share: Share) -> None:
    """What several processes could not compute as one would is refused in all of them, before the first step.

    first_step: finished steps. Raises: InvalidInput.
    """
    if share.processes == 1:
        return
    units = int(order_pairs(data, settings, first_step)[1].max()) + 1
    if units < share.processes:
        raise InvalidInput(
            f"a step has {units} {'populations' if settings.objective == 'popalign_exact' else 'pairs'} for "
            f"{share.processes} processes. Raise alignment.pairs_per_step or use fewer processes."
        )
    if settings.objective == "popalign_exact":
        for step in range(first_step, settings.steps):
            _require_undivided(data, settings, step, share)


def _require_undivided(data: AlignmentData, settings: AlignmentSettings, step: int, share: Share) -> None:
    """Where one order of the populations ends and the next begins, a population may come twice in a step.

    One process takes both for one larger population, under one logarithm; two processes could not.
    """
    pairs, units = order_pairs(data, settings, step)
    populations = [int(population) for population in data.population[pairs]]
    owners = [int(unit) % share.processes for unit in units]
    if len(set(zip(populations, owners, strict=True))) > len(set(populations)):
        raise InvalidInput(
            f"step {step + 1} has a population twice, which {share.processes} processes would divide: with "
            f"popalign_exact a step's {int(units.max()) + 1} populations must be a divisor of all "
            f"{len(number_populations(data.population)[1])}. Change alignment.pairs_per_step, or train in one process."
        )


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Neighbours of one precision, up to BUCKET_ELEMENTS together; a larger parameter alone."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        fits = buckets and size + parameter.numel() <= BUCKET_ELEMENTS and buckets[-1][0].dtype == parameter.dtype
        if not fits:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets
