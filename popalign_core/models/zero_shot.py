"""Perceived attributes by an open_clip model, without training: ensembles of prompts per group."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from popalign_core.attributes import Axis
from popalign_core.classification import AxisProbabilities, Pictures, softmax
from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import check_weights, is_path, resolve_source, source_digest
from popalign_core.models.inference import Dtype, frozen, named_in
from popalign_core.models.preprocessing import ClipPixels
from popalign_core.models.sdxl import pick_device
from popalign_core.phrases import FRAMES, NO_PERSON_PHRASES, PHRASES, DescribedAxis, described

# How open_clip names a model of the hub.
FROM_HUB = "hf-hub:"


def check_builder(source: str, axes: Sequence[str]) -> None:
    """What can be said before anything is loaded: phrases for every axis, and weights where it is a folder.

    Raises: ModelNotUsable.
    """
    if missing := [name for name in axes if name not in PHRASES]:
        raise ModelNotUsable(f"there are no phrases for {', '.join(missing)}; there are for {', '.join(PHRASES)}.")
    name, _, pretrained = source.partition("@")
    folder = Path(resolve_source(name))
    if folder.is_dir():
        check_weights(folder)
    elif is_path(source):
        raise ModelNotUsable(f"there is no folder {source} of an open_clip model (classification.builder).")
    elif not pretrained and not name.startswith(FROM_HUB):
        known = (
            ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none: open_clip has no weights of that name"
        )
        raise ModelNotUsable(
            f"{source!r} (classification.builder) names no weights, and open_clip would draw them at random. "
            f"{name}@<tag> is expected (tags: {known}), {FROM_HUB}owner/name, a folder, or emoji-clip."
        )


def builder_bytes(source: str, dtype: Dtype) -> float:
    """Of a classifier's weights, without loading them; 0 where its architecture cannot be told here."""
    name, itemsize = source.partition("@")[0], getattr(torch, dtype).itemsize
    folder = Path(resolve_source(name))
    if folder.is_dir():
        return float(itemsize * max(map(_elements, folder.glob("*.safetensors")), default=0))
    if name not in open_clip.list_models():
        return 0.0
    try:
        model = open_clip.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    except OSError:  # its text encoder is a model of the hub
        return 0.0
    return float(itemsize * sum(parameter.numel() for parameter in model.parameters()))


def _elements(path: Path) -> int:
    with cast("Any", safe_open(path, "numpy")) as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


class ZeroShotClassifier:
    """An open_clip model with its text features of groups computed once per axis; also the source of features."""

    def __init__(self, source: str, *, device: str = "auto", batch_size: int = 64, dtype: Dtype = "float32"):
        """source: an embedded name, a local open_clip folder, or "<architecture>@<pretrained tag or hub id>".

        dtype: of the image encoder; texts are encoded in it too. Raises: ModelNotUsable.
        """
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.classifier_id = named_in(f"open_clip:{Path(source).name}@{source_digest(source)}", dtype)
        name, _, pretrained = source.partition("@")
        resolved = resolve_source(name)
        if Path(resolved).is_dir():
            check_weights(Path(resolved))
            name = f"local-dir:{resolved}"
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                name, pretrained=pretrained or None, require_pretrained=True
            )
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelNotUsable(f"{source!r} could not be loaded by open_clip: {error}") from error
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.model = frozen(model, self.device, dtype)
        self.pixels = ClipPixels(open_clip.get_model_preprocess_cfg(self.model), preprocess, self.device)
        self._group_features: dict[tuple[object, ...], Tensor] = {}

    @torch.inference_mode()
    def image_features(self, images: Pictures) -> Tensor:
        """Unit features (n, d) in float32 on the CPU."""
        features = [
            functional.normalize(self.model.encode_image(self.pixels(part).to(self.dtype)).float(), dim=-1).cpu()
            for part in (images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size))
        ]
        return torch.cat(features) if features else torch.zeros((0, self.width))

    @property
    def width(self) -> int:
        """Numbers of one feature."""
        return self.text_features([""]).shape[1]

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit features (n, d) in float32 on the CPU."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return functional.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()

    def _ensemble(self, phrases: Sequence[str]) -> Tensor:
        mean = self.text_features([frame.format(phrase) for phrase in phrases for frame in FRAMES]).mean(dim=0)
        return functional.normalize(mean, dim=-1)

    def _axis_features(self, axis: DescribedAxis) -> Tensor:
        """One row a group, then one for "no person"."""
        key = (axis.axis, *(tuple(axis.phrases[group]) for group in axis.axis.groups))
        if key not in self._group_features:
            rows = [self._ensemble(axis.phrases[group]) for group in axis.axis.groups]
            self._group_features[key] = torch.stack([*rows, self._ensemble(NO_PERSON_PHRASES)])
        return self._group_features[key]

    def probabilities(self, images: Pictures, axes: Sequence[Axis]) -> list[AxisProbabilities]:
        """Softmax over the groups; "no person" against the best group. Raises: UnknownName (no phrases)."""
        return self.probabilities_of(self.image_features(images).numpy(), [described(axis) for axis in axes])

    def probabilities_of(self, features: np.ndarray, axes: Sequence[DescribedAxis]) -> list[AxisProbabilities]:
        """The same from features (n, d), float32, of images, which need not be there any more."""
        seen = torch.from_numpy(np.require(features, requirements="W"))
        outcomes: list[AxisProbabilities] = []
        for axis in axes:
            logits = (self.logit_scale * seen @ self._axis_features(axis).T).numpy()
            best_against_none = np.stack([logits[:, :-1].max(axis=1), logits[:, -1]], axis=1)
            outcomes.append(AxisProbabilities(axis.axis, softmax(logits[:, :-1]), softmax(best_against_none)[:, 1]))
        return outcomes
