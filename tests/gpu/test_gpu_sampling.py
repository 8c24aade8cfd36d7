"""On a card: a recording replays what the UNet computes, rows do not depend on neighbours, kernels are in effect."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from popalign_core.acceleration import Acceleration
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.out_of_memory import is_out_of_memory
from popalign_core.sampler_facts import sampler_facts
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from tasks.run import OneModel

SETTINGS = SamplingSettings("ddim", 4, 3.0, 0, 0, 4, "bfloat16", "default")
REQUESTS = [ImageRequest(f"base/p{n}/0", f"p{n}", f"a photo of a person {n}", 0, 1000 + n) for n in range(6)]


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cuda", dtype="bfloat16")


def draw(model: SdxlModel, requests: list[ImageRequest], settings: SamplingSettings) -> dict[str, np.ndarray]:
    return {i.request.sample_id: i.pixels for batch in sample_images(model, requests, settings) for i in batch}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_cuda_graphs_replay_the_same_bits(model: SdxlModel, batch_size: int) -> None:
    settings = replace(SETTINGS, batch_size=batch_size)
    plain = draw(model, REQUESTS, settings)
    graphed = draw(model, REQUESTS, replace(settings, acceleration=Acceleration(cuda_graphs=True)))
    for name, image in graphed.items():
        np.testing.assert_array_equal(image, plain[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_cuda_graphs_are_recorded_on_the_models_own_card() -> None:
    """cuda:0 stays the current device, as in a run with `device: cuda:1`."""
    other = load_sdxl(ModelSource("emoji"), device="cuda:1", dtype="bfloat16")
    plain = draw(other, REQUESTS, SETTINGS)
    graphed = draw(other, REQUESTS, replace(SETTINGS, acceleration=Acceleration(cuda_graphs=True)))
    assert torch.cuda.current_device() == 0
    for name, image in graphed.items():
        np.testing.assert_array_equal(image, plain[name])


def test_an_image_is_the_same_bytes_whatever_its_neighbours(model: SdxlModel) -> None:
    whole = draw(model, REQUESTS, SETTINGS)
    for others in ([REQUESTS[5]], REQUESTS[::-1]):
        for name, image in draw(model, others, SETTINGS).items():
            np.testing.assert_array_equal(image, whole[name])


def test_encoders_never_stay_on_the_card(model: SdxlModel) -> None:
    draw(model, REQUESTS, SETTINGS)
    assert {part.device.type for part in (model.pipeline.text_encoder, model.pipeline.text_encoder_2)} == {"cpu"}


@pytest.mark.parametrize("name", ["flash", "efficient", "math"])
def test_the_kernel_asked_for_is_in_effect(model: SdxlModel, name: str) -> None:
    assert sampler_facts(model, replace(SETTINGS, attention=name))["attention"] == name


@pytest.mark.parametrize("name", ["default", "flash"])
def test_weights_in_8_bits_are_computed_by_the_same_kernel(model: SdxlModel, name: str) -> None:
    rounded = load_sdxl(ModelSource("emoji", fp8_weights=True), device="cuda", dtype="bfloat16")
    settings = replace(SETTINGS, attention=name)
    assert sampler_facts(rounded, settings)["attention"] == sampler_facts(model, settings)["attention"]


def test_a_lack_of_memory_is_known_as_such() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(raised.value)


def test_two_models_are_never_in_memory_at_once() -> None:
    loaded, device = OneModel(), torch.device("cuda")
    before = torch.cuda.memory_allocated()
    loaded(ModelSource("emoji"), "cuda", "float32")
    taken = torch.cuda.memory_allocated() - before
    assert 0 < loaded.bytes_on(device) <= taken
    torch.cuda.reset_peak_memory_stats()
    loaded(ModelSource("emoji", fp8_weights=True), "cuda", "float32")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * taken
    loaded.cache_clear()
    assert torch.cuda.memory_allocated() <= before


def test_the_card_is_named(model: SdxlModel) -> None:
    assert sampler_facts(model, SETTINGS)["device"] == torch.cuda.get_device_name()
