"""AdamW in 32 and in 8 bits, and its state as tensors."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.sharding import cut_like
from popalign_core.errors import InvalidInput


def make_optimizer(parameters: list[nn.Parameter], settings: AlignmentSettings) -> torch.optim.Optimizer:
    """The optimizer of the settings, in one kernel a step where there is a GPU.

    "adamw_8bit" keeps the moments in 8 bits by blocks: a quarter of their memory, another optimizer by its rounding.
    Source: Dettmers et al. 2022, arXiv 2110.02861. Raises: InvalidInput where bitsandbytes is not installed.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw":
        fused = parameters[0].device.type == "cuda"
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    try:
        optim = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise InvalidInput(
            "alignment.optimizer is adamw_8bit, which needs bitsandbytes: pip install 'popalign[eight-bit]'. "
            "Or take adamw."
        ) from error
    for parameter in parameters:
        # Its blocks run through memory as it lies; a checkpoint has the elements in their plain order.
        parameter.data = parameter.data.contiguous()
    return optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moments and step counts, keyed "<parameter>/<quantity>"; none before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        quantities: dict[str, Any] = optimizer.state.get(parameter, {})
        tensors |= {f"{name}/{quantity}": torch.as_tensor(value) for quantity, value in quantities.items()}
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts the tensors of `optimizer_tensors`, whole, back."""
    state: dict[int, dict[str, Any]] = {}
    position = {name: index for index, name in enumerate(named)}
    for key, tensor in tensors.items():
        name, quantity = key.rsplit("/", maxsplit=1)
        # bitsandbytes counts steps in Python, torch in a float tensor.
        counted = tensor.dtype == torch.int64 and tensor.ndim == 0
        state.setdefault(position[name], {})[quantity] = int(tensor) if counted else cut_like(tensor, named[name])
    # load_state_dict moves the moments to the parameters' device and leaves the step count where it belongs.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
