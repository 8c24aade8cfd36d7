"""Batches of uint8 on the device give the pixels that the libraries' own transforms give for one PIL image."""

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from popalign_core.models.preprocessing import ClipPixels, two_passes

RNG = np.random.default_rng(0)
# Noise is the hardest picture: every value is far from its neighbours.
NOISE = RNG.integers(0, 256, (2, 90, 70, 3), np.uint8)
MOST_LEVELS, MOST_SHARE = 2, 0.06


def differences(settings: dict, images: list[np.ndarray]) -> np.ndarray:
    """In levels of 255, before normalisation."""
    transform = open_clip.image_transform(
        settings["size"], is_train=False, **{name: settings[name] for name in settings if name != "size"}
    )
    pixels = ClipPixels(settings, transform, torch.device("cpu"))(images)
    expected = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert pixels.shape == expected.shape
    assert pixels.dtype == torch.float32
    return ((pixels - expected) * torch.tensor(settings["std"]).view(3, 1, 1) * 255).abs().numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("size", "mode"), [(32, "shortest"), (70, "shortest"), (112, "shortest"), (40, "squash")])
def test_open_clip_transform(size: int, mode: str, interpolation: str) -> None:
    settings = {"size": size, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}
    settings |= {"interpolation": interpolation, "resize_mode": mode}
    # Pictures of several sizes, wide and tall, in one call.
    found = differences(settings, [NOISE[0], NOISE[1], NOISE[0].transpose(1, 0, 2), NOISE[1, :50]])
    assert found.max() <= MOST_LEVELS + 1e-3
    assert (found > 0.5).mean() <= MOST_SHARE


@pytest.mark.parametrize(("size", "mode"), [(32, "longest"), ((40, 48), "squash")])
def test_a_way_of_resizing_that_is_not_known_goes_through_the_library(size: object, mode: str) -> None:
    settings = {"size": size, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": mode}
    assert differences(settings, [NOISE[0], NOISE[1]]).max() < 1e-3


@pytest.mark.parametrize("interpolation", [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR])
def test_floating_point_as_on_a_gpu_rounds_as_pil_does(interpolation: InterpolationMode) -> None:
    pixels = torch.from_numpy(NOISE).permute(0, 3, 1, 2)
    found = two_passes(pixels, 45, 35, interpolation)
    resample = Image.Resampling.BICUBIC if interpolation is InterpolationMode.BICUBIC else Image.Resampling.BILINEAR
    expected = np.stack([np.asarray(Image.fromarray(image).resize((35, 45), resample)) for image in NOISE])
    difference = np.abs(found.permute(0, 2, 3, 1).numpy() - expected)
    assert difference.max() <= MOST_LEVELS
    assert (difference > 0.5).mean() <= MOST_SHARE
