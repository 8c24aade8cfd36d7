"""Networks that only classify: frozen, on their device, in a number format of choice."""

from typing import Literal, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public name for all

Dtype = Literal["float32", "bfloat16"]
Network = TypeVar("Network", bound=nn.Module)


def frozen(model: Network, device: torch.device, dtype: Dtype) -> Network:
    """The model itself, made ready. Weights lie in channels last, in which convolutions are fastest on CPUs and GPUs.

    In 16 bits the statistics of batch normalization stay in 32: rounded, they would shift whole channels.
    """
    model = model.to(device).eval().requires_grad_(False)
    if dtype != "float32":
        norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
        exact = [{name: value.clone() for name, value in part.state_dict().items()} for part in norms]
        model.to(getattr(torch, dtype))
        for part, state in zip(norms, exact, strict=True):
            part.float().load_state_dict(state)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - missing in torch's overloads


def named_in(classifier_id: str, dtype: Dtype) -> str:
    """The classifier's name with its number format, since labels near a border depend on that; none for float32."""
    return classifier_id if dtype == "float32" else f"{classifier_id}+{dtype}"
