"""Perceived attributes by image classifiers of transformers, one an axis (FairFace-type models from the hub too)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from popalign_core.attributes import AXES, Axis
from popalign_core.classification import AxisProbabilities, softmax
from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import check_weights, resolve_source, source_digest
from popalign_core.models.sdxl import pick_device

NO_PERSON_LABELS = {"no person", "no face", "none"}
# What label names of published classifiers mean in our vocabularies.
SYNONYMS = {
    "male": "man",
    "female": "woman",
    "east asian": "asian",
    "southeast asian": "asian",
    "latino_hispanic": "latino hispanic",
    "latino": "latino hispanic",
    "hispanic": "latino hispanic",
}


def check_heads(source: str, axes: Sequence[str]) -> None:
    """What can be said before anything is loaded: a head for every axis, with weights and known labels.

    Raises: ModelNotUsable.
    """
    folder = Path(resolve_source(source))
    if not folder.is_dir():
        raise ModelNotUsable(
            f"there is no folder {source} of classifiers (classification.judge): one sub-folder an axis is expected, "
            f"{', '.join(axes)}, each an image classifier of transformers. Embedded: emoji-heads."
        )
    for name in axes:
        if not (folder / name / "config.json").is_file():
            raise ModelNotUsable(f"the judge {source} has no classifier for {name}: {folder / name} is expected.")
        check_weights(folder / name)
        labels = _read_labels(folder / name / "config.json")
        odd = [label for label in labels if _group(label) not in {*AXES[name].groups, *NO_PERSON_LABELS}]
        if odd:
            raise ModelNotUsable(
                f"{folder / name} tells {', '.join(odd)} apart, which are no groups of {name}: "
                f"{', '.join(AXES[name].groups)}. Rename them in its config.json (id2label)."
            )


def _read_labels(config: Path) -> list[str]:
    try:
        return [str(label) for label in json.loads(config.read_text(encoding="utf-8"))["id2label"].values()]
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelNotUsable(f"{config} names no labels (id2label): {error}.") from error


def _group(label: str) -> str:
    """What a published classifier's label is called in our vocabularies."""
    name = label.strip().lower()
    return SYNONYMS.get(name, name)


class HeadClassifier:
    """One image-classification checkpoint an axis, in a folder each named like the axis, or given by hub id."""

    def __init__(self, sources: str | dict[str, str], *, device: str = "auto", batch_size: int = 64):
        """sources: a folder with one sub-folder an axis, an embedded name, or a mapping axis -> folder or hub id."""
        self.device = pick_device(device)
        self.batch_size = batch_size
        if isinstance(sources, str):
            self.classifier_id = f"heads:{Path(sources).name}@{source_digest(sources)}"
            folder = Path(resolve_source(sources))
            self.sources = {part.name: str(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        else:
            self.sources = dict(sources)
            digests = "-".join(source_digest(source) for source in self.sources.values())
            self.classifier_id = f"heads:{'+'.join(self.sources)}@{digests}"
        self._loaded: dict[str, tuple[Any, Any]] = {}

    def _load(self, name: str) -> tuple[Any, Any]:
        if name in self._loaded:
            return self._loaded[name]
        if name not in self.sources:
            known = ", ".join(self.sources)
            raise ModelNotUsable(f"classifier {self.classifier_id} has no head for {name!r}; it has {known}.")
        source = self.sources[name]
        if Path(source).is_dir():
            check_weights(Path(source))
        try:
            model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ModelNotUsable(f"{source!r} could not be loaded as an image classifier: {error}") from error
        self._loaded[name] = (model.to(self.device).eval().requires_grad_(False), processor)
        return self._loaded[name]

    @torch.inference_mode()
    def logits(self, name: str, images: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Raw logits (n, labels) and the label names. images: uint8 (n, h, w, 3)."""
        model, processor = self._load(name)
        parts: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            pixels: Tensor = processor(list(images[start : start + self.batch_size]), return_tensors="pt").pixel_values
            parts.append(model(pixels.to(self.device)).logits.float().cpu())
        labels: list[str] = [model.config.id2label[index] for index in range(model.config.num_labels)]
        return torch.cat(parts).numpy(), labels

    def probabilities(self, images: np.ndarray, axes: Sequence[Axis]) -> list[AxisProbabilities]:
        """Sums the classes that mean the same group; a "no person" class, where there is one, is kept apart."""
        outcomes: list[AxisProbabilities] = []
        for axis in axes:
            logits, labels = self.logits(axis.name, images)
            shares = softmax(logits)
            by_group = np.zeros((len(images), len(axis.groups)), dtype=shares.dtype)
            no_person = np.zeros(len(images), dtype=shares.dtype)
            for column, group in enumerate(_group(label) for label in labels):
                if group in NO_PERSON_LABELS:
                    no_person += shares[:, column]
                else:
                    by_group[:, axis.index(group)] += shares[:, column]
            total = np.maximum(by_group.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            outcomes.append(AxisProbabilities(axis, by_group / total, no_person))
        return outcomes
