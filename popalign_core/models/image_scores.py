"""How good an image is, or how well it shows its prompt, by models that were trained on people's choices."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import read_config
from popalign_core.models.preprocessing import stacked
from popalign_core.models.pretrained import load_network, load_processor
from popalign_core.models.zero_shot import ZeroShotClassifier

# PickScore_v1 is published without one; it was trained with this one.
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


class PickScore:
    """Kirstain et al. 2023: a CLIP model of transformers, fine-tuned on choices between two images."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: folder or hub id of a CLIPModel. Raises: ModelNotUsable."""
        self.device, self.batch_size = device, batch_size
        self.model = load_network(CLIPModel, source, device, "PickScore")
        own = (Path(source) / "preprocessor_config.json").is_file() or (
            Path(source) / "processor_config.json"
        ).is_file()
        self.processor = load_processor(AutoProcessor, source if own else PICKSCORE_PROCESSOR, "PickScore")

    @torch.inference_mode()
    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """exp(logit scale) x cosine, float32 (n,). images: uint8 (n, h, w, 3). texts: one an image."""
        parts: list[Tensor] = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            own = texts[start : start + self.batch_size]
            distinct = list(dict.fromkeys(own))
            inputs = self.processor(
                images=stacked(images[start : start + self.batch_size], self.device),
                text=distinct,
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            table = self.model(**inputs).logits_per_image
            columns = torch.tensor([distinct.index(text) for text in own], device=table.device)
            parts.append(table.gather(1, columns[:, None])[:, 0].float().cpu())
        return torch.cat(parts).numpy()


class HumanPreferenceScore:
    """HPS v2.1 (Wu et al. 2023): a CLIP model of open_clip, fine-tuned on people's rankings."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: an open_clip folder, see `converted_scorers`. Raises: ModelNotUsable."""
        self.clip = ZeroShotClassifier(source, device=str(device), batch_size=batch_size)

    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """100 x cosine, float32 (n,). images: uint8 (n, h, w, 3). texts: one an image."""
        distinct = list(dict.fromkeys(texts))
        known = dict(zip(distinct, self.clip.text_features(distinct), strict=True))
        wanted = torch.stack([known[text] for text in texts])
        return (100 * (self.clip.image_features(images) * wanted).sum(dim=1)).numpy()


class AestheticScore:
    """LAION's improved aesthetic predictor (Schuhmann 2022): linear layers on unit features of a CLIP model."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 32):
        """source: a folder as `converted_scorers` writes it. Raises: ModelNotUsable."""
        folder = Path(source)
        backbone = str(read_config(folder / "config.json").get("backbone", ""))
        near = folder / backbone
        self.clip = ZeroShotClassifier(
            str(near) if near.is_dir() else backbone, device=str(device), batch_size=batch_size
        )
        self.layers = read_linear_layers(folder / "model.safetensors")
        if self.layers[0][0].shape[1] != self.clip.width or self.layers[-1][0].shape[0] != 1:
            raise ModelNotUsable(
                f"{source} makes {self.layers[-1][0].shape[0]} numbers of {self.layers[0][0].shape[1]} features, and "
                f"its backbone {backbone} gives {self.clip.width}: one number of as many is expected."
            )

    @torch.inference_mode()
    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:  # noqa: ARG002 - whatever the prompt
        """Predicted mean rating, float32 (n,). images: uint8 (n, h, w, 3)."""
        found = self.clip.image_features(images)
        for weight, bias in self.layers:
            found = linear(found, weight, bias)
        return found[:, 0].numpy()


def read_linear_layers(path: Path) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of `layers.0`, `layers.2` ...: dropout lies between them, and nothing that is not linear.

    Raises: ModelNotUsable.
    """
    try:
        found = load_file(path)
        numbers = sorted(int(name.split(".")[1]) for name in found if name.endswith(".weight"))
        layers = [(found[f"layers.{n}.weight"].float(), found[f"layers.{n}.bias"].float()) for n in numbers]
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ModelNotUsable(f"{path} cannot be read as linear layers named layers.<n>: {error}") from error
    if not layers or any(low.shape[0] != high.shape[1] for (low, _), (high, _) in pairwise(layers)):
        raise ModelNotUsable(f"{path} holds no chain of linear layers named layers.<n>.")
    return layers


class VqaScore:
    """Lin et al. 2024, VQAScore: how probable "yes" is when a small vision-language model is asked about the prompt."""

    def __init__(self, source: str, device: torch.device, batch_size: int = 8):
        """source: folder or hub id of an image-text-to-text model with a chat template. Raises: ModelNotUsable."""
        self.device, self.batch_size = device, batch_size
        self.model = load_network(AutoModelForImageTextToText, source, device, "a vision-language model")
        self.processor = load_processor(AutoProcessor, source, "a vision-language model", padding_side="left")
        self.yes, self.no = (self._tokens(word) for word in ("yes", "no"))
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise ModelNotUsable(f"the tokenizer of {source} does not tell yes from no in its first token.")

    def _tokens(self, word: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        spellings = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
        first = {tokenizer(text, add_special_tokens=False).input_ids[:1][0] for text in spellings}
        return sorted(first - {tokenizer.unk_token_id})

    @torch.inference_mode()
    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """p(yes) / (p(yes) + p(no)), float32 (n,). images: uint8 (n, h, w, 3). texts: one an image."""
        parts: list[Tensor] = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            some = slice(start, start + self.batch_size)
            asked = [self._asked(text) for text in texts[some]]
            pictures = [[image] for image in stacked(images[some], self.device)]
            inputs = self.processor(text=asked, images=pictures, padding=True, max_length=None, return_tensors="pt").to(
                self.device
            )
            shares = self.model(**inputs).logits[:, -1].float().softmax(dim=-1)
            yes, no = (shares[:, tokens].sum(dim=1) for tokens in (self.yes, self.no))
            parts.append((yes / (yes + no)).cpu())
        return torch.cat(parts).numpy()

    def _asked(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(text)}]
        turn = [{"role": "user", "content": content}]
        asked: str = self.processor.apply_chat_template(turn, add_generation_prompt=True)
        return asked
