"""What the sampler, the data of a training and the trainer need of a text-to-image model, whatever its family."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from popalign_core.alignment.denoiser import Schedule
from popalign_core.models.families import Family

if TYPE_CHECKING:
    from popalign_core.models.sdxl import ModelSource, PromptEmbeddings


class TextToImageModel(Protocol):
    """A loaded model on a device; `load_model` makes one of any family."""

    family: Family
    pipeline: Any
    source: "ModelSource"
    device: torch.device

    @property
    def network(self) -> Any:
        """The part that predicts, and that is trained."""
        ...

    @property
    def native_size(self) -> int:
        """Image side in pixels at which the denoiser was trained."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Raises: InvalidInput where images of that size cannot be drawn."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> "PromptEmbeddings":
        """Embeddings of prompts, on the CPU."""
        ...

    def encode_unconditional(self) -> "PromptEmbeddings":
        """What stands for "no prompt"."""
        ...

    def conditions(self, rows: "PromptEmbeddings", empty: "PromptEmbeddings | None") -> dict[str, Tensor]:
        """What the pipeline is called with for a batch of prompts. empty: None without guidance."""
        ...

    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of captions and of the empty one, by the names of `AlignmentData`."""
        ...

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of images, as the denoiser expects them."""
        ...

    def schedule(self, image_size: int = 0) -> Schedule:
        """The forward process. image_size: pixels a side, 0 = the model's own."""
        ...

    def denoiser(self, image_size: int = 0) -> nn.Module:
        """The network as a `TrainableDenoiser`."""
        ...
