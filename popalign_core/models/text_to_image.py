"""What the sampler, the data of a training and the trainer need of a text-to-image model, whatever its family."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from popalign_core.alignment.denoiser import Schedule
from popalign_core.models.families import Family

if TYPE_CHECKING:
    from popalign_core.models.prompt_embeddings import PromptEmbeddings, PromptEncoder
    from popalign_core.models.sdxl import ModelSource


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
    def pixels_per_latent(self) -> int:
        """Image pixels per latent position along each side."""
        ...

    @property
    def native_size(self) -> int:
        """Image side in pixels at which the denoiser was trained."""
        ...

    def check_size(self, height: int, width: int) -> None:
        """Raises: InvalidInput where images of that size cannot be drawn."""
        ...

    @property
    def prompts(self) -> "PromptEncoder":
        """Its text encoders."""
        ...

    def encode_prompts(self, texts: Sequence[str]) -> "PromptEmbeddings":
        """Embeddings of at least one prompt, on the CPU in the model's dtype."""
        ...

    @property
    def has_zero_unconditional(self) -> bool:
        """Whether zeros stand for "no prompt"."""
        ...

    def encode_unconditional(self) -> "PromptEmbeddings":
        """What stands for "no prompt"."""
        ...

    def conditions(self, context: Tensor, pooled: Tensor, height: int, width: int) -> dict[str, Any]:
        """What the network is called with beside latents and time, rows as given. height, width in pixels."""
        ...

    def shift(self, height: int, width: int) -> dict[str, float]:
        """What a sampler's times are set with beside their number. height, width in pixels."""
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
