"""Approximate samplers: each setting changes the images, is named in the fingerprint, and leaves nothing behind."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from popalign_core.approximations import ApproximateConfig
from popalign_core.config import SamplingConfig, with_settings
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.approximate import inner_cache
from popalign_core.models.checkpoints import check_cacheable
from popalign_core.models.lora import ADAPTER, add_lora, save_lora
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.presets import preset
from popalign_core.sampler_facts import sampler_facts, sampler_fingerprint
from popalign_core.sampling import ImageRequest, SamplingSettings, prepared, sample_images

SETTINGS = SamplingSettings("dpm++", 4, 3.0, 0, 0, 2, "float32", "default")
REQUESTS = [ImageRequest(f"base/p/{n}", "p", f"a photo of a {who}", n, n) for n, who in enumerate(["judge", "cook"])]


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cpu")


def draw(model: SdxlModel, settings: SamplingSettings = SETTINGS, wanted: list[ImageRequest] = REQUESTS) -> np.ndarray:
    return np.stack([image.pixels for batch in sample_images(model, wanted, settings) for image in batch])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


def test_the_default_is_exact() -> None:
    assert ApproximateConfig().is_exact
    for name in ("emoji", "sdxl", "sdxl-paper"):
        sampling = preset(name).sampling
        assert sampling.approximate.is_exact
        drawn = (sampling.drawn_scheduler, sampling.drawn_steps, sampling.drawn_guidance)
        assert drawn == (sampling.scheduler, sampling.steps, sampling.guidance_scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "10"}, "not fewer than the 10"),
        ({"distilled_lora": "x"}, "set sampling.approximate.steps"),
        ({"distilled_guidance": "2"}, "there is none"),
        ({"cache_every": "0"}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        with_settings(preset("emoji"), {f"sampling.approximate.{name}": value for name, value in settings.items()})


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling.approximate.cache_every": "2", "acceleration.compile": "full"},
        {"sampling.approximate.cache_every": "2", "acceleration.cuda_graphs": "true"},
        {"sampling.approximate.fp8_weights": "true", "acceleration.compile": "regional"},
        {"sampling.approximate.fp8_weights": "true", "acceleration.compile": "full"},
        {"sampling.approximate.fp8_weights": "true", "acceleration.cuda_graphs": "true"},
        {"sampling.approximate.fp8_weights": "true", "acceleration.fused_projections": "true"},
    ],
)
def test_what_would_undo_an_approximation_is_refused_with_it(settings: dict[str, str]) -> None:
    (approximate, _), (acceleration, value) = settings.items()
    with pytest.raises(InvalidInput, match=f"{approximate} .*{acceleration}={value} .*turn one of them off"):
        with_settings(preset("sdxl"), settings | {"alignment.lora_rank": "0"})
    with_settings(preset("sdxl"), {"sampling.approximate.cache_every": "2", "acceleration.compile": "regional"})


def test_the_cache_computes_the_inner_part_each_so_many_steps_and_leaves_the_model_as_it_was(model: SdxlModel) -> None:
    unet, calls = model.pipeline.unet, {"inner": 0, "outer": 0}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name, part in (("inner", unet.mid_block.resnets[0]), ("outer", unet.down_blocks[0].resnets[0]))
    ]
    exact = draw(model)
    assert calls == {"inner": 4, "outer": 4}
    cached = draw(model, replace(SETTINGS, cache_every=3))
    assert calls == {"inner": 4 + 2, "outer": 8}  # at steps 0 and 3
    assert difference(cached, exact) > 0.5
    for hook in hooks:
        hook.remove()
    np.testing.assert_array_equal(draw(model), exact)


def test_a_cached_image_is_the_same_bytes_whatever_its_neighbours(model: SdxlModel) -> None:
    settings = replace(SETTINGS, cache_every=2)
    whole = draw(model, settings)
    np.testing.assert_array_equal(draw(model, settings, REQUESTS[::-1]), whole[::-1])
    np.testing.assert_array_equal(draw(model, settings, REQUESTS[1:]), whole[1:])


def test_the_cache_begins_with_a_computed_step(model: SdxlModel) -> None:
    """Or an image would hold something of the batch before: with one step, nothing is reused."""
    one = replace(SETTINGS, steps=1)
    np.testing.assert_array_equal(draw(model, replace(one, cache_every=2)), draw(model, one))


def test_fp8_rounds_the_weights(model: SdxlModel) -> None:
    rounded = load_sdxl(ModelSource("emoji", fp8_weights=True), device="cpu")
    weight = rounded.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.float8_e4m3fn
    own = model.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    torch.testing.assert_close(weight.float(), own.to(torch.float8_e4m3fn).float(), rtol=0, atol=0)
    assert 0.1 < difference(draw(rounded), draw(model)) < 40


def test_attention_is_computed_in_the_computations_format_and_not_in_that_of_8_bit_weights(model: SdxlModel) -> None:
    rounded = load_sdxl(ModelSource("emoji", fp8_weights=True), device="cpu")
    for name in ("default", "flash"):
        settings = replace(SETTINGS, attention=name)
        assert sampler_facts(rounded, settings)["attention"] == sampler_facts(model, settings)["attention"] == "flash"


def test_every_approximation_has_a_fingerprint_of_its_own(model: SdxlModel, lora: str) -> None:
    exact = sampler_fingerprint(model, SETTINGS)
    prints = {exact, sampler_fingerprint(model, replace(SETTINGS, cache_every=2))}
    for more in ({"fp8_weights": True}, {"distilled_lora": lora}):
        source = ModelSource("emoji", **more)
        prints.add(sampler_fingerprint(SdxlModel(model.pipeline, source, model.device), SETTINGS))
    assert len(prints) == 4


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One that was not trained to anything, but changes something."""
    folder = tmp_path_factory.mktemp("lora")
    unet = load_sdxl(ModelSource("emoji"), device="cpu").pipeline.unet
    add_lora(unet, 2, "attention", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if f"lora_B.{ADAPTER}" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_lora(unet, folder)
    return str(folder)


def test_a_distilled_model_draws_with_its_scheduler_and_guidance(model: SdxlModel, lora: str) -> None:
    config = SamplingConfig(
        scheduler="dpm++", steps=10, guidance_scale=3, approximate=ApproximateConfig(steps=4, distilled_lora=lora)
    )
    assert (config.drawn_scheduler, config.drawn_steps, config.drawn_guidance) == ("lcm", 4, 1)
    distilled = load_sdxl(ModelSource("emoji", distilled_lora=lora), device="cpu")
    assert not hasattr(distilled.pipeline.unet, "peft_config")  # added to the weights: costs nothing at sampling
    settings = replace(SETTINGS, scheduler="lcm", guidance_scale=1.0)
    drawn = draw(distilled, settings)
    assert type(prepared(distilled, settings).scheduler).__name__ == "LCMScheduler"
    assert difference(drawn, draw(model, settings)) > 0.5
    # The scheduler adds noise of its own, which has to come from the image's seed as well.
    np.testing.assert_array_equal(draw(distilled, settings, REQUESTS[::-1]), drawn[::-1])


def test_a_distilled_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelNotUsable, match="/nowhere"):
        load_sdxl(ModelSource("emoji", distilled_lora="/nowhere/lora"), device="cpu")


def test_a_model_without_inner_levels_cannot_be_cached(tmp_path: Path) -> None:
    flat = SimpleNamespace(
        pipeline=SimpleNamespace(unet=SimpleNamespace(down_blocks=[0], mid_block=0, up_blocks=[0])),
        source=ModelSource("flat"),
    )
    with pytest.raises(InvalidInput, match="leave it at 1"), inner_cache(flat, 2):  # pyright: ignore
        pass
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"block_out_channels": [48]}')
    with pytest.raises(InvalidInput, match="one level only"):
        check_cacheable(str(tmp_path))
    check_cacheable("emoji")
