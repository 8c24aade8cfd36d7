"""An image depends on its identity alone: not on neighbours, order, shard or padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from popalign_core import sampling
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.out_of_memory import is_out_of_memory
from popalign_core.sampler_facts import sampler_fingerprint
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images

SETTINGS = SamplingSettings("ddim", 2, 3.0, 0, 0, 4, "float32", "default")
TEXTS = ("a photo of a firefighter", "a photo of a dark skinned woman judge", "a photo of a person juggling")


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cpu")


def request(number: int, seed: int | None = None) -> ImageRequest:
    text = TEXTS[number % len(TEXTS)]
    return ImageRequest(f"base/p{number}/0", f"p{number}", text, 0, 1000 + number if seed is None else seed)


def draw(
    model: SdxlModel, requests: list[ImageRequest], settings: SamplingSettings = SETTINGS
) -> dict[str, np.ndarray]:
    return {i.request.sample_id: i.pixels for batch in sample_images(model, requests, settings) for i in batch}


def test_an_image_is_the_same_bytes_whatever_its_neighbours(model: SdxlModel) -> None:
    requests = [request(number) for number in range(6)]
    whole = draw(model, requests)
    assert {image.shape for image in whole.values()} == {(64, 64, 3)}
    for others in ([requests[5]], [requests[5], requests[0]], requests[::-1]):
        for name, image in draw(model, others).items():
            np.testing.assert_array_equal(image, whole[name])


def test_another_batch_size_changes_rounding_only(model: SdxlModel) -> None:
    requests = [request(number) for number in range(3)]
    one, four = draw(model, requests, replace(SETTINGS, batch_size=1)), draw(model, requests)
    for name, image in four.items():
        assert np.abs(image.astype(int) - one[name]).max() <= 2


def test_another_seed_is_another_image(model: SdxlModel) -> None:
    images = draw(model, [request(0), replace(request(0, seed=7), sample_id="other")])
    assert np.abs(images["base/p0/0"].astype(int) - images["other"]).mean() > 5


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_every_scheduler_draws(model: SdxlModel, scheduler: str) -> None:
    settings = replace(SETTINGS, scheduler=scheduler, batch_size=1)
    assert draw(model, [request(0)], settings)["base/p0/0"].std() > 10


def test_a_size_that_does_not_divide_is_refused(model: SdxlModel) -> None:
    with pytest.raises(InvalidInput, match="60 x 64 is not divisible by 16"):
        draw(model, [request(0)], replace(SETTINGS, height=60, width=64))


def test_the_fingerprint_names_what_can_move_a_pixel(model: SdxlModel) -> None:
    prints = {
        sampler_fingerprint(model, settings)
        for settings in (SETTINGS, replace(SETTINGS, steps=3), replace(SETTINGS, batch_size=8))
    }
    assert len(prints) == 3
    assert sampler_fingerprint(model, SETTINGS) in prints


TEXTS_OF_LIBRARIES = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
)


@pytest.mark.parametrize("text", TEXTS_OF_LIBRARIES)
def test_memory_runs_out_in_many_words(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


def test_what_is_no_lack_of_memory_is_raised(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory."),
        MemoryError(),
    ):
        assert not is_out_of_memory(other)

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sampling, "_denoised", fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        draw(model, [request(0)])


def limited(monkeypatch: pytest.MonkeyPatch, work: str, place: int, fits: int, error: RuntimeError) -> list[int]:
    """Lets a part of the sampler fail for more images at once than fit. Returns: how many were tried, in order."""
    really, sizes = getattr(sampling, work), []

    def limited_work(*given):
        count = given[place] if isinstance(given[place], int) else len(given[place])
        sizes.append(count)
        if count > fits:
            raise error
        return really(*given)

    monkeypatch.setattr(sampling, work, limited_work)
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), RuntimeError(TEXTS_OF_LIBRARIES[-1])])
def test_out_of_memory_halves_the_batch_and_draws_the_same_images(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    requests = [request(number) for number in range(6)]
    whole = draw(model, requests)
    sizes = limited(monkeypatch, "_denoised", 2, 2, error)
    drawn = [image for batch in sample_images(model, requests, SETTINGS) for image in batch]
    assert sizes == [4, 2, 2, 2]
    assert [image.request for image in drawn] == requests
    assert {(image.batch_size, image.vae_batch) for image in drawn} == {(2, 2)}
    for image in drawn:
        assert np.abs(image.pixels.astype(int) - whole[image.request.sample_id]).max() <= 2


def test_what_the_vae_has_no_room_for_is_decoded_in_smaller_parts_and_not_denoised_again(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(number) for number in range(6)]
    expected = [image for batch in sample_images(model, requests, SETTINGS) for image in batch]
    denoised = limited(monkeypatch, "_denoised", 2, 4, torch.OutOfMemoryError("never"))
    decoded = limited(monkeypatch, "_decoded", 2, 1, torch.OutOfMemoryError("made up"))
    drawn = [image for batch in sample_images(model, requests, SETTINGS) for image in batch]
    assert (denoised, decoded) == ([4, 4], [4, 2, 1, 1])
    assert {(image.batch_size, image.vae_batch) for image in drawn} == {(4, 1)}
    for image, whole in zip(drawn, expected, strict=True):
        assert torch.equal(image.latents, whole.latents)
        assert np.abs(image.pixels.astype(int) - whole.pixels).max() <= 1


def test_where_not_one_latent_can_be_decoded_the_batch_is_halved_as_well(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded UNet keeps its memory, which a smaller batch takes less of."""
    really, tried = sampling._decoded, []

    def crowded(denoising, latents, at_once, settings):
        tried.append((len(latents), at_once))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("made up")
        return really(denoising, latents, at_once, settings)

    monkeypatch.setattr(sampling, "_decoded", crowded)
    drawn = [image for batch in sample_images(model, [request(0)], SETTINGS) for image in batch]
    assert tried == [(4, 4), (4, 2), (4, 1), (2, 2)]
    assert [(image.batch_size, image.vae_batch) for image in drawn] == [(2, 2)]


@pytest.mark.parametrize("work", ["_denoised", "_decoded"])
def test_one_image_that_does_not_fit_is_an_error(model: SdxlModel, monkeypatch: pytest.MonkeyPatch, work: str) -> None:
    limited(monkeypatch, work, 2, 0, torch.OutOfMemoryError("made up"))
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, [request(0)])
