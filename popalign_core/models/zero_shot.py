"""Perceived attributes by an open_clip model, without training: ensembles of prompts per group."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from popalign_core.attributes import Axis
from popalign_core.classification import AxisProbabilities, softmax
from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import check_weights, is_path, resolve_source, source_digest
from popalign_core.models.sdxl import pick_device

# Each group is the mean of its phrases in each of these frames.
FRAMES = ("a photo of {}", "a picture of {}", "{}")
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "perceived_gender": {"man": ("a man",), "woman": ("a woman",)},
    "perceived_skin_tone": {
        tone: (f"a {tone} skinned person", f"a {tone} skinned man", f"a {tone} skinned woman")
        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    },
    "perceived_race": {
        "white": ("a white person",),
        "asian": ("an Asian person",),
        "black": ("a Black person",),
        "latino hispanic": ("a Latino person", "a Hispanic person"),
        "indian": ("an Indian person",),
        "middle eastern": ("a Middle Eastern person",),
    },
    "perceived_age": {
        "young": ("a young person",),
        "middle-aged": ("a middle-aged person",),
        "old": ("an old person",),
    },
    "perceived_couple": {
        "a man and a woman": ("a man and a woman",),
        "two men": ("two men",),
        "two women": ("two women",),
    },
}
NO_PERSON_PHRASES = ("an object",)


def check_builder(source: str, axes: Sequence[str]) -> None:
    """What can be said before anything is loaded: phrases for every axis, and weights where it is a folder.

    Raises: ModelNotUsable.
    """
    if missing := [name for name in axes if name not in PHRASES]:
        raise ModelNotUsable(f"there are no phrases for {', '.join(missing)}; there are for {', '.join(PHRASES)}.")
    folder = Path(resolve_source(source.partition("@")[0]))
    if folder.is_dir():
        check_weights(folder)
    elif is_path(source):
        raise ModelNotUsable(f"there is no folder {source} of an open_clip model (classification.builder).")


class ZeroShotClassifier:
    """An open_clip model with its text features of groups computed once per axis; also the source of features."""

    def __init__(self, source: str, *, device: str = "auto", batch_size: int = 64):
        """source: an embedded name, a local open_clip folder, or "<architecture>@<pretrained tag or hub id>".

        Raises: ModelNotUsable.
        """
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.classifier_id = f"open_clip:{Path(source).name}@{source_digest(source)}"
        name, _, pretrained = source.partition("@")
        resolved = resolve_source(name)
        if Path(resolved).is_dir():
            check_weights(Path(resolved))
            name = f"local-dir:{resolved}"
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained or None)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelNotUsable(f"{source!r} could not be loaded by open_clip: {error}") from error
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.preprocess = preprocess
        self._group_features: dict[str, Tensor] = {}

    @torch.inference_mode()
    def image_features(self, images: np.ndarray) -> Tensor:
        """Unit features (n, d) in float32 on the CPU. images: uint8 (n, h, w, 3)."""
        features: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            views: list[Tensor] = [self.preprocess(Image.fromarray(image)) for image in part]
            pixels = torch.stack(views).to(self.device)
            features.append(functional.normalize(self.model.encode_image(pixels).float(), dim=-1).cpu())
        return torch.cat(features)

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit features (n, d) in float32 on the CPU."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return functional.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()

    def _ensemble(self, phrases: Sequence[str]) -> Tensor:
        mean = self.text_features([frame.format(phrase) for phrase in phrases for frame in FRAMES]).mean(dim=0)
        return functional.normalize(mean, dim=-1)

    def _axis_features(self, axis: Axis) -> Tensor:
        """One row a group, then one for "no person"."""
        if axis.name not in self._group_features:
            phrases = PHRASES[axis.name]
            rows = [self._ensemble(phrases[group]) for group in axis.groups]
            self._group_features[axis.name] = torch.stack([*rows, self._ensemble(NO_PERSON_PHRASES)])
        return self._group_features[axis.name]

    def probabilities(self, images: np.ndarray, axes: Sequence[Axis]) -> list[AxisProbabilities]:
        """Softmax over the groups; "no person" against the best group."""
        features = self.image_features(images)
        scale = float(self.model.logit_scale.exp())
        outcomes: list[AxisProbabilities] = []
        for axis in axes:
            logits = (scale * features @ self._axis_features(axis).T).numpy()
            best_against_none = np.stack([logits[:, :-1].max(axis=1), logits[:, -1]], axis=1)
            outcomes.append(AxisProbabilities(axis, softmax(logits[:, :-1]), softmax(best_against_none)[:, 1]))
        return outcomes
