"""A UNet's forward pass as one CUDA graph: at small batches starting its kernels takes longer than running them."""

from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3


class GraphedUnet:
    """Stands for a UNet that is always called with tensors of the same shapes, on CUDA.

    The first call of a shape records; the others copy their arguments in and replay. What it returns is overwritten by
    the next call.
    """

    def __init__(self, unet: Any):
        """unet: compiled or not; its weights must stay where they are."""
        self._unet = unet
        self._graph: torch.cuda.CUDAGraph | None = None
        self._entered: list[Tensor] = []
        self._left: tuple[Tensor, ...] = ()

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool = False,
    ) -> tuple[Tensor, ...]:
        """See `UNet2DConditionModel.forward`."""
        del return_dict
        given = [sample, timestep, encoder_hidden_states, *added_cond_kwargs.values()]
        # Streams and recordings are the current device's, kernels their tensors': apart, a recording would be empty.
        with torch.cuda.device(sample.device):
            if self._graph is None or [part.shape for part in given] != [part.shape for part in self._entered]:
                self._record(given, list(added_cond_kwargs))
            for kept, part in zip(self._entered, given, strict=True):
                kept.copy_(part)
            assert self._graph is not None  # recorded above
            self._graph.replay()
        return self._left

    def _record(self, given: list[Tensor], names: list[str]) -> None:
        self._graph, self._left = None, ()  # frees the memory of an earlier shape first
        self._entered = [part.clone() for part in given]

        def forward() -> tuple[Tensor, ...]:
            sample, timestep, context, *conditions = self._entered
            return self._unet(
                sample,
                timestep,
                encoder_hidden_states=context,
                added_cond_kwargs=dict(zip(names, conditions, strict=True)),
                return_dict=False,
            )

        # Libraries set themselves up in the first calls, which a recording cannot contain.
        device = given[0].device
        aside, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                forward()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Left to itself torch records on a stream of the device that was current at its first recording.
        with torch.cuda.graph(graph, stream=aside):
            self._left = forward()
        self._graph = graph
