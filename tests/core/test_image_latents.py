"""Images to moments of latents: how many at once, what neighbours change, and one rule of scaling for both ways."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from popalign_core.models.image_latents import encode_batch, encode_named, vae_digest
from popalign_core.models.latent_labels import decode_latents
from popalign_core.models.latent_scaling import scaled_moments, unscaled
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl

IMAGES = np.random.default_rng(0).integers(0, 256, (67, 64, 64, 3), dtype=np.uint8)
NAMED = [(f"s{n}", image) for n, image in enumerate(IMAGES)]


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cpu")


def watched(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch, limit: int = 64, error: Callable[[], Exception] = RuntimeError
) -> list[int]:
    """Sizes of the batches that are tried; more than the limit is more than the memory."""
    really, sizes = model.encode_images, []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(pixels))
        if len(pixels) > limit:
            raise error()
        return really(pixels)

    monkeypatch.setattr(model, "encode_images", encode)
    return sizes


def test_as_many_at_once_as_two_images_of_sdxl_have_pixels() -> None:
    assert [encode_batch(side) for side in (64, 128, 256, 512, 768, 1024, 2048)] == [64, 64, 32, 8, 3, 2, 1]


def test_every_batch_has_one_shape_and_neighbours_change_nothing(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = watched(model, monkeypatch)
    found = dict(encode_named(model, iter(NAMED)))
    assert sizes == [64, 64]
    assert list(found) == [name for name, _ in NAMED]
    alone = dict(encode_named(model, NAMED[66:]))["s66"]
    for part, of_all, of_one in zip(("mean", "deviation"), found["s66"], alone, strict=True):
        assert torch.equal(of_all, of_one), part
    assert dict(encode_named(model, [])) == {}


def oom() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")


def cudnn() -> Exception:
    return RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")


@pytest.mark.parametrize("error", [oom, cudnn])
def test_without_memory_the_batch_is_halved_and_moments_differ_by_rounding(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    expected = dict(encode_named(model, NAMED))
    sizes = watched(model, monkeypatch, 16, error)
    found = dict(encode_named(model, NAMED))
    assert sizes == [64, 32, 16, 16, 16, 16, 16]
    assert list(found) == list(expected)
    for name, moments in found.items():
        for part, whole in zip(moments, expected[name], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)


def test_one_image_that_does_not_fit_and_other_errors_are_raised(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = watched(model, monkeypatch, 0, oom)
    with pytest.raises(torch.OutOfMemoryError):
        list(encode_named(model, NAMED[:2]))
    assert sizes == [64, 32, 16, 8, 4, 2, 1]
    watched(model, monkeypatch, 0, lambda: RuntimeError("a shape does not fit"))
    with pytest.raises(RuntimeError, match="a shape"):
        list(encode_named(model, NAMED[:2]))


def test_another_vae_has_another_digest(model: SdxlModel) -> None:
    other = load_sdxl(ModelSource("emoji"), device="cpu")
    assert vae_digest(other) == vae_digest(model)
    other.pipeline.vae.register_to_config(scaling_factor=0.5)
    assert vae_digest(other) != vae_digest(model)
    other = load_sdxl(ModelSource("emoji"), device="cpu")
    with torch.no_grad():
        next(other.pipeline.vae.parameters()).add_(1e-3)
    assert vae_digest(other) != vae_digest(model)
    assert vae_digest(load_sdxl(ModelSource("emoji"), device="cpu", dtype="bfloat16")) != vae_digest(model)


# --- scaling ---

FACTOR = {"scaling_factor": 0.5}
SHIFTED = FACTOR | {"shift_factor": 0.25}
BY_CHANNEL = FACTOR | {"latents_mean": [1.0, -2.0, 0.0, 3.0], "latents_std": [2.0, 4.0, 1.0, 0.5]}


def vae_of(scaling: dict[str, Any]) -> AutoencoderKL:
    """A tiny one with 4 channels of latents, 8 x 8 pixels each."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": [4] * 4, "norm_num_groups": 2, "layers_per_block": 1}
    return AutoencoderKL(**blocks, **widths, latent_channels=4, **scaling).eval().requires_grad_(False)


@pytest.mark.parametrize("scaling", [FACTOR, SHIFTED, BY_CHANNEL])
def test_both_ways_follow_one_rule(scaling: dict[str, Any]) -> None:
    config = vae_of(scaling).config
    own = torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    mean, deviation = scaled_moments(own, torch.ones_like(own), config)
    torch.testing.assert_close(unscaled(mean, config), own)
    # What is one deviation from the mean in one is so in the other.
    torch.testing.assert_close(unscaled(mean + deviation, config), own + 1)


def test_a_vae_with_means_of_channels_gives_the_latents_that_the_denoiser_knows() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    vae = model.pipeline.vae = vae_of(BY_CHANNEL)
    pixels = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    mean, deviation = model.encode_images(pixels)
    for channel in range(4):
        shift, spread = BY_CHANNEL["latents_mean"][channel], BY_CHANNEL["latents_std"][channel]
        torch.testing.assert_close(mean[:, channel], (posterior.mean[:, channel] - shift) * 0.5 / spread)
        torch.testing.assert_close(deviation[:, channel], posterior.std[:, channel] * 0.5 / spread)
    own = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(decode_latents(model, mean).astype(float) - own * 255).max() <= 1
