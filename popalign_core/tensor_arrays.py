"""Tensors as the arrays that storage takes, bit for bit; numpy has no bfloat16, so its bits stand there as uint16."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def as_array(tensor: Tensor) -> np.ndarray:
    """The values of a tensor on any device; bfloat16 as its bits in uint16."""
    plain = tensor.detach().cpu().contiguous()
    return (plain.view(torch.int16).numpy().view(np.uint16) if plain.dtype == torch.bfloat16 else plain.numpy()).copy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor that `as_array` was given. Raises: ValueError where the array is of another type."""
    if dtype == torch.bfloat16 and array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    tensor = torch.from_numpy(array.copy())
    if tensor.dtype != dtype:
        raise ValueError(f"an array of {array.dtype} does not hold {dtype}.")
    return tensor


def as_bytes(tensor: Tensor) -> bytes:
    """The values in the order of the shape, little-endian."""
    array = as_array(tensor)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def from_bytes(data: bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """The tensor that `as_bytes` was given. dtype: its name without "torch."."""
    stored = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    array = np.frombuffer(data, stored.newbyteorder("<")).astype(stored)
    return as_tensor(array.reshape(tuple(shape)), getattr(torch, dtype))
