"""Prompts as the UNet reads them: each encoded once, and named by what encoded it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from popalign_core.models.families import FAMILIES
from popalign_core.tensor_arrays import as_array, as_tensor


@dataclass(frozen=True)
class PromptEmbeddings:
    """Rows of distinct prompts: context (n, tokens, width), pooled (n, width), of width 0 where a model takes none."""

    context: Tensor
    pooled: Tensor

    def rows(self, indices: Sequence[int]) -> "PromptEmbeddings":
        """The rows of the given prompts, repeats allowed."""
        index = torch.tensor(list(indices))
        return PromptEmbeddings(self.context[index], self.pooled[index])


class PromptEncoder:
    """A pipeline's text encoders. They lie in main memory, and on the accelerator only while they encode."""

    def __init__(self, pipeline: Any, device: torch.device, surroundings: Mapping[str, str]):
        """surroundings: device and versions, which decide an embedding's last bit."""
        self._pipeline, self._device, self._surroundings = pipeline, device, surroundings
        self._family = FAMILIES[type(pipeline).__name__]
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def _encoders(self) -> list[Any]:
        return self._present(self._family.text_encoders)

    def _present(self, names: Sequence[str]) -> list[Any]:
        return [part for part in (getattr(self._pipeline, name) for name in names) if part is not None]

    @cached_property
    def digest(self) -> str:
        """Names the encoders (16 hex digits): weights as loaded, a LoRA's included, vocabularies and surroundings."""
        digest = hashlib.sha256(repr(sorted(self._surroundings.items())).encode())
        for encoder in self._encoders:
            for name, weight in sorted(encoder.state_dict().items()):
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(as_array(weight).tobytes())
        for tokenizer in self._present(self._family.tokenizers):
            vocabulary = sorted(tokenizer.get_vocab().items())
            digest.update(repr((vocabulary, tokenizer.model_max_length, tokenizer.pad_token)).encode())
        return digest.hexdigest()[:16]

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """Those that `encode` would have to run the encoders for, each once."""
        return [text for text in dict.fromkeys(texts) if text not in self._known]

    def add(self, stored: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Takes over embeddings that an encoder of this digest made: context (tokens, width) and pooled (width,)."""
        dtype = self._encoders[0].dtype
        for text, (context, pooled) in stored.items():
            self._known[text] = as_tensor(context, dtype)[None], as_tensor(pooled, dtype)[None]

    def arrays(self, texts: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Embeddings to store, as `add` takes them."""
        found = self.encode(texts)
        return {text: (as_array(found.context[row]), as_array(found.pooled[row])) for row, text in enumerate(texts)}

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> PromptEmbeddings:
        """Embeddings of at least one prompt, on the CPU in the model's dtype.

        Each prompt is encoded alone: in a batch its embedding would change, by rounding, with the batch's size.
        """
        if missing := self.unknown(texts):
            try:
                for encoder in self._encoders:
                    encoder.to(self._device)
                for text in missing:
                    context, pooled = self._encoded(text)
                    self._known[text] = context.cpu(), pooled.cpu()
            finally:
                for encoder in self._encoders:
                    encoder.to("cpu")
        found = [self._known[text] for text in texts]
        return PromptEmbeddings(
            torch.cat([context for context, _ in found]), torch.cat([pooled for _, pooled in found])
        )

    def _encoded(self, text: str) -> tuple[Tensor, Tensor]:
        # None = the same prompt for every encoder.
        others = {f"prompt_{place}": None for place in range(2, len(self._family.text_encoders) + 1)}
        context, _, *pooled = self._pipeline.encode_prompt(
            prompt=text, **others, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return context, pooled[0] if pooled else context.new_zeros(1, 0)
