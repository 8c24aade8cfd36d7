"""Perceived attributes by image classifiers of transformers, one an axis (FairFace-type models from the hub too)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from popalign_core.attributes import AXES, Axis
from popalign_core.classification import AxisProbabilities, Pictures, softmax
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.attribute_labels import NO_PERSON, group_of, label_fault
from popalign_core.models.checkpoints import check_weights, is_path, resolve_source, source_digest
from popalign_core.models.inference import Dtype, frozen, named_in
from popalign_core.models.preprocessing import stacked
from popalign_core.models.pretrained import load_network, load_processor
from popalign_core.models.sdxl import pick_device


def parse_sources(source: str) -> str | dict[str, str]:
    """A folder or embedded name as it is; "axis=source,axis=source" (folders or hub ids) as a mapping.

    Raises: InvalidInput.
    """
    if "=" not in source:
        return source
    pairs = [part.partition("=") for part in source.split(",")]
    if bad := [name for name, _, place in pairs if name.strip() not in AXES or not place.strip()]:
        raise InvalidInput(
            f"classification.judge {source!r}: {bad[0]!r} is no axis with a classifier; axis=folder or hub id is "
            f"expected, separated by commas. Axes are {', '.join(AXES)}."
        )
    return {name.strip(): place.strip() for name, _, place in pairs}


def check_heads(source: str, axes: Sequence[str]) -> None:
    """What can be said before anything is loaded: a head for every axis, in a folder with weights and known labels.

    A head named by a hub id passes: only loading it shows what it is. Raises: ModelNotUsable, InvalidInput.
    """
    sources = parse_sources(source)
    if isinstance(sources, str):
        folder = Path(resolve_source(sources))
        if not folder.is_dir():
            raise ModelNotUsable(
                f"there is no folder {source} of classifiers (classification.judge): one sub-folder an axis is "
                f"expected, {', '.join(axes)}, each an image classifier of transformers. Or name folders or hub ids: "
                "axis=source,axis=source. Embedded: emoji-heads."
            )
        sources = {name: str(folder / name) for name in axes}
    for name in axes:
        if name not in sources:
            raise ModelNotUsable(f"the judge {source} has no classifier for {name}.")
        head = Path(sources[name])
        if not (head / "config.json").is_file():
            if head.is_dir() or is_path(sources[name]) or "=" not in source:
                raise ModelNotUsable(f"the judge {source} has no classifier for {name}: {head} is expected.")
            continue
        check_weights(head)
        if fault := label_fault(_read_labels(head / "config.json"), AXES[name]):
            raise ModelNotUsable(f"{head} is not usable: {fault}. Rename its labels in its config.json (id2label).")


def _read_labels(config: Path) -> list[str]:
    try:
        return [str(label) for label in json.loads(config.read_text(encoding="utf-8"))["id2label"].values()]
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelNotUsable(f"{config} names no labels (id2label): {error}.") from error


class _Head(NamedTuple):
    """settings: of its processor, as text: heads that are alike share their pixels."""

    model: Any
    processor: Any
    settings: str
    labels: list[str]


class HeadClassifier:
    """One image-classification checkpoint an axis, in a folder each named like the axis, or given by hub id."""

    def __init__(
        self,
        sources: str | Mapping[str, str],
        *,
        device: str = "auto",
        batch_size: int = 64,
        dtype: Dtype = "float32",
    ):
        """sources: a folder with one sub-folder an axis, an embedded name, or axis -> folder or hub id (or as text)."""
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.dtype: Dtype = dtype
        parsed = parse_sources(sources) if isinstance(sources, str) else sources
        if isinstance(parsed, str):
            name = f"heads:{Path(parsed).name}@{source_digest(parsed)}"
            folder = Path(resolve_source(parsed))
            self.sources = {part.name: str(part) for part in sorted(folder.iterdir()) if part.is_dir()}
        else:
            self.sources = dict(parsed)
            digests = "-".join(source_digest(source) for source in self.sources.values())
            name = f"heads:{'+'.join(self.sources)}@{digests}"
        self.classifier_id = named_in(name, dtype)
        self._loaded: dict[str, _Head] = {}

    def _load(self, name: str) -> _Head:
        if name in self._loaded:
            return self._loaded[name]
        if name not in self.sources:
            known = ", ".join(self.sources)
            raise ModelNotUsable(f"classifier {self.classifier_id} has no head for {name!r}; it has {known}.")
        source = self.sources[name]
        model = load_network(AutoModelForImageClassification, source, self.device, "an image classifier")
        processor = load_processor(AutoImageProcessor, source, "an image classifier")
        labels = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        if name in AXES and (fault := label_fault(labels, AXES[name])):
            raise ModelNotUsable(f"{source} is not usable: {fault}. Rename its labels in a copy (id2label).")
        model = frozen(model, self.device, self.dtype)
        self._loaded[name] = _Head(model, processor, processor.to_json_string(), labels)
        return self._loaded[name]

    def logits(self, name: str, images: Pictures) -> tuple[np.ndarray, list[str]]:
        """Raw logits (n, labels) and the label names."""
        return self.all_logits([name], images)[0], self._load(name).labels

    @torch.inference_mode()
    def all_logits(self, names: Sequence[str], images: Pictures) -> list[np.ndarray]:
        """Of several heads: pixels are made once for all whose processors are alike."""
        heads = [self._load(name) for name in names]
        parts: list[list[Tensor]] = [[torch.zeros((0, len(head.labels)))] for head in heads]
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            pixels: dict[str, Tensor] = {}
            for head, found in zip(heads, parts, strict=True):
                if head.settings not in pixels:
                    pixels[head.settings] = self._pixels(head.processor, part)
                found.append(head.model(pixels[head.settings]).logits.float().cpu())
        return [torch.cat(found).numpy() for found in parts]

    def _pixels(self, processor: Any, images: Pictures) -> Tensor:
        """By the library's own processor, which works on the device where it has torchvision's operations for that."""
        given = (
            stacked(images, self.device)
            if isinstance(images, np.ndarray)
            else [stacked(image[None], self.device)[0] for image in images]
        )
        pixels: Tensor = processor(given, return_tensors="pt", device=self.device).pixel_values
        return pixels.to(self.device, getattr(torch, self.dtype), memory_format=torch.channels_last)

    def probabilities(self, images: Pictures, axes: Sequence[Axis]) -> list[AxisProbabilities]:
        """Sums the classes that mean the same group; a "no person" class, where there is one, is kept apart."""
        outcomes: list[AxisProbabilities] = []
        for axis, logits in zip(axes, self.all_logits([axis.name for axis in axes], images), strict=True):
            shares = softmax(logits)
            by_group = np.zeros((len(images), len(axis.groups)), dtype=shares.dtype)
            no_person = np.zeros(len(images), dtype=shares.dtype)
            for column, label in enumerate(self._load(axis.name).labels):
                group = group_of(label, axis)
                if group == NO_PERSON:
                    no_person += shares[:, column]
                elif group is not None:
                    by_group[:, axis.index(group)] += shares[:, column]
            total = np.maximum(by_group.sum(axis=1, keepdims=True), np.finfo(np.float32).tiny)
            outcomes.append(AxisProbabilities(axis, by_group / total, no_person))
        return outcomes
