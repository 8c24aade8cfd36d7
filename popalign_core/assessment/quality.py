"""Text-image agreement and distance of image features, each with an interval where it has one."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    LEVELS,
    Comparison,
    Estimate,
    estimate_ratio,
    require_same_prompts,
    resample_prompts,
    sums_by_prompt,
)
from popalign_core.errors import InvalidInput


class _Features(torch.nn.Module):
    """Stands where torchmetrics expects a network from images to features: what it is given already is features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """100 max(cos(image, text), 0) for every image, (images,), features (images, dims) of any length.

    The formula of torchmetrics' CLIPScore, which loads its own model by name and so cannot take ready features. Values
    of different models cannot be compared. Raises: InvalidInput.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise InvalidInput(f"features do not pair: images {image_features.shape}, texts {text_features.shape}.")
    images = image_features.astype(np.float64)
    texts = text_features.astype(np.float64)
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * np.maximum((images * texts).sum(axis=1) / lengths, 0)


def paired_cosines(base: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """Of images of the same noise, row by row, (images,)."""
    lengths = np.linalg.norm(base, axis=1) * np.linalg.norm(aligned, axis=1)
    return (base.astype(np.float64) * aligned).sum(axis=1) / lengths


def estimate_score(
    per_image: np.ndarray,
    prompt_ids: Sequence[str],
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Estimate:
    """The mean over images with an interval by drawing prompts, all images of each. Raises: InvalidInput."""
    names, sums, images = sums_by_prompt(per_image, np.asarray(prompt_ids))
    return estimate_ratio(sums, images, resample_prompts(len(names), rng, resamples)).estimate


def compare_scores(
    before: np.ndarray,
    after: np.ndarray,
    prompt_ids: Sequence[str],
    after_prompt_ids: Sequence[str] | None = None,
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Comparison:
    """Means before and after, paired by prompt; the relative change is `ratio` - 1. Raises: InvalidInput.

    after_prompt_ids: where the sides differ in their images; the prompts must be the same.
    """
    names, sums_before, images_before = sums_by_prompt(before, np.asarray(prompt_ids))
    after_ids = prompt_ids if after_prompt_ids is None else after_prompt_ids
    names_after, sums_after, images_after = sums_by_prompt(after, np.asarray(after_ids))
    require_same_prompts(names, names_after)
    picks = resample_prompts(len(names), rng, resamples)
    return estimate_ratio(sums_after, images_after, picks).compared_with(
        estimate_ratio(sums_before, images_before, picks)
    )


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), features (images, dims): the Frechet distance.

    By torchmetrics' FID class, or of fewer images than dims in a form that is cheaper and rounds less.
    In the space of the given features, so that it cannot be compared with a published FID. Grows as images get fewer:
    compare only between equal numbers of images. Raises: InvalidInput.
    """
    a, b = _paired_spaces(features_a, features_b)
    if max(len(a), len(b)) < a.shape[1]:
        return _frechet_of_few(a, b)
    metric = FrechetInceptionDistance(feature=_Features(a.shape[1]))
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def _frechet_of_few(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same of fewer images than dims, where products of images are smaller than covariances.

    With centred features A and B over the roots of n - 1, tr((A'A B'B)^1/2) is the sum of the singular values of A B'.
    """
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    centred_a, centred_b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    traces = float(centred_a.square().sum() + centred_b.square().sum())
    shared = float(np.linalg.svd((centred_a @ centred_b.T).numpy(), compute_uv=False).sum())
    return float((mean_a - mean_b).square().sum()) + traces - 2 * shared


def kernel_distance(
    features_a: np.ndarray, features_b: np.ndarray, *, seed: int, subsets: int = 50, subset_size: int = 100
) -> Estimate:
    """Squared MMD with the kernel (x.y / dims + 1)^3, torchmetrics' KID class: mean over subsets, low and high.

    The interval is that of the subsets' values, of this subset size; it shows how steady the mean is, not its error.
    Its mean is 0 for features of one distribution, at any number of images. Raises: InvalidInput.
    """
    a, b = _paired_spaces(features_a, features_b)
    values: list[float] = []
    # torchmetrics draws subsets from torch's global source and keeps only their mean and spread.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save", category=UserWarning)
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(
            feature=_Features(a.shape[1]),
            subsets=1,
            subset_size=min(subset_size, len(a), len(b)),
            compute_with_cache=False,
        )
        metric.update(a, real=True)
        metric.update(b, real=False)
        for _ in range(subsets):
            values.append(float(metric.compute()[0]))
    low, high = np.percentile(values, LEVELS)
    return Estimate(float(np.mean(values)), float(low), float(high), len(a) + len(b))


def _paired_spaces(features_a: np.ndarray, features_b: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    if (
        features_a.ndim != 2
        or features_a.shape[1:] != features_b.shape[1:]
        or min(len(features_a), len(features_b)) < 2
    ):
        raise InvalidInput(
            "a distance needs features (images, dims) of at least two images a side, "
            f"got {features_a.shape} and {features_b.shape}."
        )
    return torch.from_numpy(features_a.astype(np.float64)), torch.from_numpy(features_b.astype(np.float64))
