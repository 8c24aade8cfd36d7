"""An image depends on its identity alone: not on neighbours, order, shard or padding."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from popalign_core import sampling
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
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


def test_out_of_memory_halves_the_batch_and_draws_the_same_images(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(number) for number in range(6)]
    whole = draw(model, requests)
    really, sizes = sampling._draw_batch, []

    def limited(denoising, rows, seeds, settings):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("made up")
        return really(denoising, rows, seeds, settings)

    monkeypatch.setattr(sampling, "_draw_batch", limited)
    drawn = [image for batch in sample_images(model, requests, SETTINGS) for image in batch]
    assert sizes == [4, 2, 2, 2]
    assert [image.request for image in drawn] == requests
    assert {image.batch_size for image in drawn} == {2}
    for image in drawn:
        assert np.abs(image.pixels.astype(int) - whole[image.request.sample_id]).max() <= 2


def test_one_image_that_does_not_fit_is_an_error(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(sampling, "_draw_batch", never)
    with pytest.raises(torch.OutOfMemoryError):
        draw(model, [request(0)])
