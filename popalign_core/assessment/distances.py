"""How far the aligned model's images are from the base's as sets, overall and by group, and what chance would show."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist

from popalign_core.assessment.quality import frechet_distance, kernel_distance
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed

# The largest of so many values without an effect is passed once in twenty times.
SWAPS = 19
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
Distance = Callable[[np.ndarray, np.ndarray, int], float]


def cmmd(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """1000 x squared MMD with the kernel exp(-|x - y|^2 / 200), mean over all pairs: the biased estimate of the source.

    features (images, dims), unit length. Source: Jayasumana et al. 2024, "Rethinking FID", equation 4 and their code.
    Raises: InvalidInput.
    """
    if (
        features_a.ndim != 2
        or features_a.shape[1:] != features_b.shape[1:]
        or not min(len(features_a), len(features_b))
    ):
        raise InvalidInput(f"features (images, dims) of one space are needed: {features_a.shape}, {features_b.shape}.")

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.exp(-cdist(x, y, "sqeuclidean") / (2 * CMMD_SIGMA**2)).mean())

    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    return CMMD_SCALE * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


DISTANCES: dict[str, Distance] = {
    "frechet_to_base": lambda a, b, _: frechet_distance(a, b),
    "fd_dinov2": lambda a, b, _: frechet_distance(a, b),
    "fid": lambda a, b, _: frechet_distance(a, b),
    "kid": lambda a, b, seed: kernel_distance(a, b, seed=seed).value,
    "cmmd": lambda a, b, _: cmmd(a, b),
}


@dataclass(frozen=True)
class DistanceToBase:
    """value: of the aligned from the base model's images. n: pairs of images from the same noise.

    null_mean, null_high: mean and largest of `SWAPS` values with sides swapped pair by pair: a value above the largest
    is met once in twenty times where the two models draw alike.
    """

    measure: str
    value: float
    null_mean: float
    null_high: float
    n: int


@dataclass(frozen=True)
class GroupDistance:
    """As `DistanceToBase`, of the images that show one group; all but the numbers None where a side has fewer than two.

    n_base, n_aligned: images with that group of either model. null_mean, null_high: with the images of both sides
    dealt anew at random, as many to each side as before.
    """

    measure: str
    value: float | None
    null_mean: float | None
    null_high: float | None
    n_base: int
    n_aligned: int


def group_distance(measure: str, base: np.ndarray, aligned: np.ndarray, *, seed: int) -> GroupDistance:
    """base, aligned: features (images, dims) of one group's images. What shows a group differs, so nothing is paired.

    The aligned model may show a group in other prompts than the base did; that is part of the distance.
    """
    sizes = len(base), len(aligned)
    if min(sizes) < 2:
        return GroupDistance(measure, None, None, None, *sizes)
    together = np.concatenate([base, aligned])

    def dealt(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(len(together))
        return together[order[: sizes[0]]], together[order[sizes[0] :]]

    value = DISTANCES[measure](base, aligned, seed)
    return GroupDistance(measure, value, *_by_chance(measure, dealt, "group", seed), *sizes)


def distance_to_base(measure: str, base: np.ndarray, aligned: np.ndarray, *, seed: int) -> DistanceToBase:
    """base, aligned: features (images, dims), row by row from the same prompt and noise. Raises: InvalidInput."""
    if base.shape != aligned.shape or base.ndim != 2 or len(base) < 2:
        raise InvalidInput(f"features of the same two or more images are needed: {base.shape} and {aligned.shape}.")

    def swapped(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        sides = rng.random(len(base))[:, None] < 0.5
        return np.where(sides, aligned, base), np.where(sides, base, aligned)

    value = DISTANCES[measure](base, aligned, seed)
    return DistanceToBase(measure, value, *_by_chance(measure, swapped, "distance", seed), len(base))


def _by_chance(
    measure: str, draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], what: str, seed: int
) -> tuple[float, float]:
    """Mean and largest of `SWAPS` distances between sides that differ by chance alone. draw: gives two such sides."""
    rngs = [np.random.default_rng(derive_seed(seed, what, measure, str(swap))) for swap in range(SWAPS)]
    null = [DISTANCES[measure](*draw(rng), seed) for rng in rngs]
    return float(np.mean(null)), float(np.max(null))
