"""Sharded training: a process keeps a part of every weight, of its gradient, its moments and its average.

FSDP2 (`torch.distributed.fsdp.fully_shard`) cuts each weight along its first dimension into as many parts as there are
processes. Before a group of layers computes, forward or backward, its weights are gathered from all of them, and are
given back afterwards; a gradient is averaged over the processes where it arises, and each keeps its part. So all of
them must make the same passes in the same order. A sharded weight is a DTensor, of its whole shape, that holds a part.
After ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) and FSDP (Zhao et al. 2023, arXiv 2304.11277).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from popalign_core.alignment.exchange import exchanged

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(network: nn.Module, groups: Sequence[nn.Module], device: torch.device) -> None:
    """Divides a network's weights over all processes of the default group, in place.

    groups: modules inside it, none in another, that are gathered one at a time; what is in none of them is gathered for
    a whole pass. device: where the parts go; the network may still be elsewhere. Weights must be the same everywhere.
    """
    # Late: DTensor takes a second to import, and most of what trains is not sharded.
    from torch.distributed import get_world_size, init_device_mesh  # pyright: ignore
    from torch.distributed.fsdp import fully_shard  # pyright: ignore[reportUnknownVariableType]

    odd = _of_another_format(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device) if parameter in odd else parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in (*groups, network):
        # Of the network itself too, or its last gathering would stay in memory between the passes.
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=odd)


def _of_another_format(network: nn.Module) -> set[nn.Parameter]:
    """What cannot be gathered in one message with the rest: the float32 vectors of a bfloat16 reference. Left whole."""
    formats = {parameter.dtype for parameter in network.parameters()}
    return {parameter for parameter in network.parameters() if parameter.ndim < 2} if len(formats) > 1 else set()


def is_part(tensor: Tensor) -> bool:
    """Whether the tensor is sharded: this process holds a part of it."""
    return hasattr(tensor, "full_tensor")


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of a model's parameters is."""
    return any(is_part(parameter) for parameter in parameters)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on its device; another as it is.

    All processes must call it. Raises: LostProcess.
    """
    return exchanged(cast("DTensor", tensor.detach()).full_tensor) if is_part(tensor) else tensor.detach()


def all_whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """As `whole`, one after another; what was put together goes to the host's memory.

    keep: False in a process that only takes part; it gets nothing back.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        together = whole(tensor)
        if keep:
            found[name] = together.cpu() if is_part(tensor) else together
    return found


def cut_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of a whole tensor, where the other one of that shape is sharded; else the tensor as it is."""
    if is_part(tensor) or not is_part(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded = cast("DTensor", model)
    # Every process has the whole one, from the same file: nothing is sent.
    return distribute_tensor(tensor, sharded.device_mesh, sharded.placements, src_data_rank=None)
