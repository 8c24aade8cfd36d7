"""Which class scores for which kind of scorer, and what can be said of a source before anything is loaded."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from popalign_core.errors import UnknownName
from popalign_core.models.checkpoints import source_digest
from popalign_core.models.image_features import ClipVisionFeatures, DinoFeatures, InceptionFeatures
from popalign_core.models.image_scores import AestheticScore, HumanPreferenceScore, PickScore, VqaScore
from popalign_core.models.pretrained import check_network
from popalign_core.models.sdxl import pick_device


@runtime_checkable
class Scorer(Protocol):
    """One number an image."""

    def scores(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """float32 (n,). images: uint8 (n, h, w, 3). texts: one an image."""
        ...


class FeatureExtractor(Protocol):
    """One vector an image."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 (n, dims). images: uint8 (n, h, w, 3)."""
        ...


_SCORES: dict[str, Callable[[str, torch.device], Scorer]] = {
    "pickscore": PickScore,
    "hps": HumanPreferenceScore,
    "aesthetics": AestheticScore,
    "vqa": VqaScore,
}
_FEATURES: dict[str, Callable[[str, torch.device], FeatureExtractor]] = {
    "dinov2": DinoFeatures,
    "clip_vision": ClipVisionFeatures,
    "inception": InceptionFeatures,
}


def load_scorer(kind: str, source: str, device: str) -> Scorer | FeatureExtractor:
    """kind: as in `popalign_core.quality_config.SCORERS`. Raises: UnknownName, ModelNotUsable."""
    makers = {**_SCORES, **_FEATURES}
    if kind not in makers:
        raise UnknownName(kind="scorer", got=kind, known=list(makers))
    return makers[kind](source, pick_device(device))


def scorer_id(kind: str, source: str) -> str:
    """Who says so, with the digest of its weights."""
    return f"{kind}:{Path(source).name}@{source_digest(source)}"


def check_scorers(sources: Mapping[str, str]) -> None:
    """Local folders hold safetensors; hub ids pass. sources: by kind. Raises: ModelNotUsable."""
    for kind, source in sources.items():
        check_network(source.partition("@")[0], f"quality.scorers: {kind}")
