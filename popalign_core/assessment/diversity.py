"""How unlike the images of one perceived group are among themselves: a group may be there and always look the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.resampling import LEVELS
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed

SUBSETS = 50
MOST_IMAGES = 100
# Of the smaller side, so that subsets of both sides differ.
TAKEN = 0.8


@dataclass(frozen=True)
class GroupDiversity:
    """Vendi score of a group's images: mean, 2.5 and 97.5% over subsets of `size` images, nan where size is below 2.

    n: images of the group. size: the same for every model that is compared, since the score grows with images.
    """

    model_id: str
    group: str
    value: float
    low: float
    high: float
    n: int
    size: int


def vendi_score(features: np.ndarray) -> float:
    """The effective number of unlike images: exp of the entropy of the eigenvalues of their cosines / n.

    features (images, dims): 1 = all alike, n = all orthogonal. Source: Friedman & Dieng 2023, "The Vendi Score", eq. 2.
    Raises: InvalidInput without an image.
    """
    if features.ndim != 2 or not len(features):
        raise InvalidInput(f"a Vendi score needs features (images, dims), got shape {features.shape}.")
    unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    # Squared singular values of X / sqrt(n) are the eigenvalues of X X' / n.
    values = np.square(np.linalg.svd(unit, compute_uv=False)) / len(unit)
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def group_diversity(
    features: Mapping[str, np.ndarray], labels: Mapping[str, Sequence[str | None]], axis: Axis, *, seed: int
) -> list[GroupDiversity]:
    """By model and group. features: (images, dims) by model id; labels: the perceived group of each image, None = none.

    Every group has a row. Subsets are drawn without replacement. Raises: InvalidInput where labels do not pair.
    """
    for model, own in features.items():
        if len(own) != len(labels[model]):
            raise InvalidInput(f"{len(own)} images of {model} and {len(labels[model])} labels do not pair.")
    rows: list[GroupDiversity] = []
    for group in axis.groups:
        found = {m: own[np.array([label == group for label in labels[m]], bool)] for m, own in features.items()}
        size = min(MOST_IMAGES, int(TAKEN * min(map(len, found.values()))))
        for model, images in found.items():
            rng = np.random.default_rng(derive_seed(seed, "diversity", axis.name, group, model))
            value, low, high = _over_subsets(images, size, rng)
            rows.append(GroupDiversity(model, group, value, low, high, len(images), size))
    return rows


def _over_subsets(images: np.ndarray, size: int, rng: np.random.Generator) -> tuple[float, float, float]:
    if size < 2:
        return np.nan, np.nan, np.nan
    scores = [vendi_score(images[rng.choice(len(images), size, replace=False)]) for _ in range(SUBSETS)]
    low, high = np.percentile(scores, LEVELS)
    return float(np.mean(scores)), float(low), float(high)
