"""Persons or faces by an object-detection model of transformers (YOLOS, DETR, RT-DETR and their kin)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from popalign_core.detection import Box, Kind
from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import check_weights, is_path, read_config, source_digest
from popalign_core.models.preprocessing import stacked
from popalign_core.models.pretrained import load_network, load_processor
from popalign_core.models.sdxl import pick_device

# Class names of COCO, Objects365 and Open Images.
LABELS: dict[Kind, set[str]] = {
    "person": {"person", "human", "people"},
    "face": {"face", "human face", "faces"},
}


def check_detector(source: str, kind: Kind) -> None:
    """What can be said before anything is loaded: a folder holds weights and a class of that kind; a hub id passes.

    Raises: ModelNotUsable.
    """
    folder = Path(source)
    if folder.is_dir():
        check_weights(folder)
        _classes(source, kind, read_config(folder / "config.json").get("id2label", {}))
    elif is_path(source):
        raise ModelNotUsable(f"there is no folder {source} of a detector (detection.{kind}s).")


def _classes(source: str, kind: Kind, names: dict[Any, str]) -> set[int]:
    found = {int(index) for index, name in names.items() if str(name).strip().lower() in LABELS[kind]}
    if not found:
        shown = ", ".join(str(name) for name in list(names.values())[:8])
        raise ModelNotUsable(
            f"{source} detects no {kind}: none of {', '.join(sorted(LABELS[kind]))} is among its classes ({shown})."
        )
    return found


class BoxDetector:
    """Finds one kind of thing with a checkpoint of any architecture that transformers detects objects with."""

    def __init__(
        self, source: str, kind: Kind, *, min_confidence: float = 0.5, device: str = "auto", batch_size: int = 16
    ):
        """source: a folder or a hub id. Raises: ModelNotUsable."""
        check_detector(source, kind)
        self.device, self.batch_size, self.min_confidence = pick_device(device), batch_size, min_confidence
        self.detector_id = f"detector:{Path(source).name}@{source_digest(source)}"
        self.model = load_network(AutoModelForObjectDetection, source, self.device, "an object detector")
        self.processor = load_processor(AutoImageProcessor, source, "an object detector")
        self.classes = _classes(source, kind, self.model.config.id2label)

    @torch.inference_mode()
    def find(self, images: np.ndarray) -> list[list[Box]]:
        """Boxes of every image, cut off at its border. images: uint8 (n, h, w, 3)."""
        found: list[list[Box]] = []
        height, width = images.shape[1:3]
        for start in range(0, len(images), self.batch_size):
            part = stacked(images[start : start + self.batch_size], self.device)
            inputs = self.processor(part, return_tensors="pt", device=self.device).to(self.device)
            results = self.processor.post_process_object_detection(
                self.model(**inputs), threshold=self.min_confidence, target_sizes=[(height, width)] * len(part)
            )
            found += [self._boxes(result, height, width) for result in results]
        return found

    def _boxes(self, result: dict[str, Any], height: int, width: int) -> list[Box]:
        corners: Sequence[Sequence[int]] = result["boxes"].round().int().tolist()
        rows = zip(corners, result["scores"].tolist(), result["labels"].tolist(), strict=True)
        boxes = [
            Box(max(left, 0), max(top, 0), min(right, width), min(bottom, height), float(score))
            for (left, top, right, bottom), score, label in rows
            if label in self.classes
        ]
        return [box for box in boxes if box.right > box.left and box.bottom > box.top]
