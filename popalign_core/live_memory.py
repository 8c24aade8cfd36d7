"""Peak memory and arithmetic of a computation, counted as it runs; on meta tensors nothing is allocated or computed."""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Used:
    """peak_bytes: of all tensors that the computation made and that were alive at once. flop: multiply-add = 2."""

    peak_bytes: int
    flop: float


# Bytes an element that kernels take while they run: of a matrix of attention, which of its entries are -infinity.
_INSIDE = {torch.ops.aten._safe_softmax.default: 1}


def count_use(computation: Callable[[], object], *, whole_attention: bool = False) -> Used:
    """Runs it once. Attention is taken to be a fused kernel, which keeps its inputs, its output and a row of sums.

    whole_attention: torch's kernel "math" instead, which makes the matrix of every head, in float32.
    Not counted: what kernels take inside, the allocator's fragments, the CUDA context.
    """
    live, attention = LiveBytes(), _Attention()
    with live, nullcontext() if whole_attention else attention.standing_in():
        computation()
    return Used(live.peak, live.flop + attention.flop)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still alive; peak: the most at once.

    flop: of the matrix products and convolutions, by torch's formulas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flop = 0.0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            # What came in was made outside, unless it is known already; a view is its input's storage.
            if isinstance(leaf, Tensor) and _place(leaf) not in inputs:
                self._add(leaf)
        if (inside := _INSIDE.get(func)) is not None:
            self.peak = max(self.peak, self.now + inside * result.numel())
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, place = tensor.untyped_storage(), _place(tensor)
        if place in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, place, size)

    def _remove(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # pyright: ignore[reportPrivateUsage] - meta tensors have no address


class _Attention:
    """A stand-in for attention on meta tensors, which would take the kernel that keeps the whole matrix."""

    def __init__(self) -> None:
        self.flop = 0.0

    @contextmanager
    def standing_in(self) -> Generator[None]:
        """Not a mode of torch: those are off in a backward pass, where checkpoints run their forward pass again."""
        real = functional.scaled_dot_product_attention

        def attend(query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any) -> Tensor:
            if query.device.type != "meta":
                return real(query, key, value, *more, **options)
            return cast("Tensor", _StandIn.apply(query, key, value, self))

        functional.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = real

    def add(self, query: Tensor, key: Tensor, products: int) -> None:
        """products: matrix products of that size."""
        self.flop += products * 2.0 * query.numel() * key.shape[-2]


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counter: _Attention) -> Tensor:
        counter.add(query, key, 2)
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.counter = counter
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors[:3]
        ctx.counter.add(query, key, 4)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
