"""Every exact acceleration draws what it drew without, and does what its name says.

Bitwise where the arithmetic is the same. Otherwise latents may move by rounding: float32 rounds to 6e-8, and errors of
some hundred layers, two steps and a guidance of 3 add up like a random walk to 6e-8 * 3 * sqrt(200) = 3e-6 of the
largest value. 5e-6 was the most seen; the bound is ten times that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from popalign_core.acceleration import Acceleration
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.models.attention import CROSS, attentions, ignores_empty_context
from popalign_core.models.cuda_graphs import GraphedUnet
from popalign_core.models.lora import add_lora
from popalign_core.models.sdxl import SCHEDULERS, ModelSource, SdxlModel, load_sdxl
from popalign_core.sampler_facts import sampler_differences, sampler_facts
from popalign_core.sampling import ImageRequest, SamplingSettings, prepared, sample_images

PLAIN = Acceleration(skip_empty_attention=False)
SETTINGS = SamplingSettings("ddim", 2, 3.0, 0, 0, 3, "float32", "default", PLAIN)
TEXTS = ("a photo of a firefighter", "a photo of a dark skinned woman judge", "a photo of a person juggling")
REQUESTS = [ImageRequest(f"base/p{n}/0", f"p{n}", text, 0, 1000 + n) for n, text in enumerate(TEXTS)]
ROUNDING = 5e-5


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cpu")


def draw(model: SdxlModel, settings: SamplingSettings) -> tuple[np.ndarray, torch.Tensor]:
    drawn = [image for batch in sample_images(model, REQUESTS, settings) for image in batch]
    return np.stack([image.pixels for image in drawn]), torch.stack([image.latents for image in drawn])


def by(**switches: object) -> SamplingSettings:
    return replace(SETTINGS, acceleration=replace(PLAIN, **switches))


def assert_rounding_only(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm++"])
def test_the_loop_is_the_pipelines_bit_for_bit(model: SdxlModel, scheduler: str) -> None:
    pipeline = load_sdxl(ModelSource("emoji"), device="cpu").pipeline  # with diffusers' own processors
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    prompts, empty = model.encode_prompts(TEXTS), model.encode_unconditional()
    expected = pipeline(
        prompt_embeds=prompts.context,
        pooled_prompt_embeds=prompts.pooled,
        negative_prompt_embeds=empty.context.expand(3, -1, -1),
        negative_pooled_prompt_embeds=empty.pooled.expand(3, -1),
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(request.seed) for request in REQUESTS],
        output_type="np",
    ).images
    for acceleration in (PLAIN, Acceleration()):
        settings = replace(SETTINGS, scheduler=scheduler, steps=3, acceleration=acceleration)
        np.testing.assert_array_equal(draw(model, settings)[0], np.round(expected * 255).astype(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_over_nothing_is_skipped_bit_for_bit(dtype: str) -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype=dtype)
    rows: list[int] = []
    for kind, module in attentions(model.pipeline.unet):
        if kind == CROSS:
            module.to_v.register_forward_hook(lambda _module, _given, value: rows.append(len(value)))
    settings = replace(SETTINGS, dtype=dtype)
    whole = draw(model, settings)
    assert set(rows) == {6}
    rows.clear()
    skipped = draw(model, replace(settings, acceleration=Acceleration()))
    assert set(rows) == {3}
    np.testing.assert_array_equal(skipped[0], whole[0])
    assert torch.equal(skipped[1], whole[1])


def test_attention_over_something_is_not_skipped(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampler_facts(model, by(skip_empty_attention=True))["skip_empty_attention"] == "True"
    assert sampler_facts(model, replace(SETTINGS, guidance_scale=1.0))["skip_empty_attention"] == "False"
    cross = next(module for kind, module in attentions(model.pipeline.unet) if kind == CROSS)
    biased = torch.nn.Linear(cross.to_v.in_features, cross.to_v.out_features)
    with monkeypatch.context() as patch:
        patch.setitem(cross._modules, "to_v", biased)
        assert not ignores_empty_context(model.pipeline.unet)
    with monkeypatch.context() as patch:
        patch.setitem(model.pipeline.config.__dict__, "force_zeros_for_empty_prompt", False)
        patch.setattr(type(model), "has_zero_unconditional", False)
        assert sampler_facts(model, by(skip_empty_attention=True))["skip_empty_attention"] == "False"
    assert ignores_empty_context(model.pipeline.unet)


def test_an_adapter_is_in_what_is_skipped() -> None:
    model = load_sdxl(ModelSource("emoji"), device="cpu")
    add_lora(model.pipeline.unet, 2, "attention", 0)
    with torch.no_grad():
        for name, weight in model.pipeline.unet.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    whole, skipped = draw(model, SETTINGS), draw(model, by(skip_empty_attention=True))
    assert torch.equal(skipped[1], whole[1])
    with pytest.raises(InvalidInput, match="leaves no place for a LoRA"):
        draw(model, by(fused_projections=True))


@pytest.mark.parametrize("switches", [{"fused_projections": True}, {"channels_last": "on"}])
def test_another_order_of_the_same_products_rounds_otherwise(model: SdxlModel, switches: dict[str, bool]) -> None:
    assert_rounding_only(draw(model, by(**switches))[1], draw(model, SETTINGS)[1])


def test_switches_are_taken_back(model: SdxlModel) -> None:
    before = draw(model, SETTINGS)
    draw(model, by(fused_projections=True, channels_last="on", skip_empty_attention=True))
    again = draw(model, SETTINGS)
    assert torch.equal(again[1], before[1])
    np.testing.assert_array_equal(again[0], before[0])


def test_fused_projections_are_used(model: SdxlModel) -> None:
    denoising = prepared(model, by(fused_projections=True))
    unused = [module.to_k for _, module in attentions(model.pipeline.unet)]
    hooks = [part.register_forward_hook(lambda *_: pytest.fail("computed alone")) for part in unused]
    denoising.denoise(model.encode_prompts(TEXTS[:1]), [0])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("name", "operation"), [("math", "_scaled_dot_product_attention_math"), ("flash", "flash_attention_for_cpu")]
)
def test_the_attention_kernel_is_the_one_asked_for(model: SdxlModel, name: str, operation: str) -> None:
    settings = replace(SETTINGS, attention=name, steps=1)
    model.encode_prompts([*TEXTS, ""])  # the setting is not for text encoders
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        drawn = draw(model, settings)[1]
    ran = {event.key for event in seen.key_averages() if "_scaled_dot_product" in event.key}
    assert ran
    assert all(operation in key for key in ran)
    assert sampler_facts(model, settings)["attention"] == name
    assert_rounding_only(drawn, draw(model, replace(settings, attention="default"))[1])


def test_a_kernel_that_cannot_be_used_is_refused(model: SdxlModel) -> None:
    with pytest.raises(InvalidInput, match=r"sampling\.attention is cudnn, which torch cannot use"):
        draw(model, replace(SETTINGS, attention="cudnn"))


def test_a_kernel_is_asked_for_the_images_own_attention_and_for_a_captions(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(_query: torch.Tensor, key: torch.Tensor, _value: torch.Tensor) -> int:
        return {64: SDPBackend.FLASH_ATTENTION, 77: SDPBackend.MATH}[key.shape[2]].value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    assert sampler_facts(model, SETTINGS)["attention"] == "flash+math"
    with pytest.raises(InvalidInput, match=r"flash, which torch cannot use .* would take flash\+math. Choose default"):
        draw(model, replace(SETTINGS, attention="flash"))


def test_parts_of_a_batch_decode_as_the_whole(model: SdxlModel) -> None:
    whole, parts = draw(model, SETTINGS), draw(model, by(vae_batch=2))
    assert torch.equal(parts[1], whole[1])
    assert np.abs(parts[0].astype(int) - whole[0]).max() <= 1


def test_an_image_is_decoded_in_one_shape_wherever_it_stands(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    denoising, shapes = prepared(model, by(vae_batch=3)), []
    latents = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    really = model.pipeline.vae.decode
    monkeypatch.setattr(
        model.pipeline.vae, "decode", lambda given, **more: shapes.append(len(given)) or really(given, **more)
    )
    with torch.inference_mode():
        pixels = denoising.decode(latents)
        assert shapes == [3, 3, 3]
        np.testing.assert_array_equal(denoising.decode(latents.flip(0)), pixels[::-1])
        np.testing.assert_array_equal(denoising.decode(latents[:4]), pixels[:4])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_pixels_that_are_no_numbers_are_refused(
    model: SdxlModel, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    drawn = torch.zeros(1, 3, 64, 64)
    drawn[0, 0, 0, 0] = value
    monkeypatch.setattr(model.pipeline.vae, "decode", lambda *_, **__: (drawn,))
    with pytest.raises(InvalidInput, match="pixels that are no numbers in float32"):
        prepared(model, SETTINGS).decode(torch.zeros(1, 8, 16, 16))


def test_a_gpu_decodes_few_large_images_at_once() -> None:
    auto = Acceleration()
    cases = {("cpu", 1024): 8, ("cuda", 64): 8, ("cuda", 512): 2, ("cuda", 1024): 2}
    assert {(device, side): auto.decoded_at_once(8, device, side, side) for device, side in cases} == cases
    assert auto.decoded_at_once(1, "cuda", 1024, 1024) == 1
    assert [Acceleration(vae_batch=4).decoded_at_once(batch, "cuda", 1024, 1024) for batch in (8, 3)] == [4, 3]


def test_the_vae_has_its_own_number_format() -> None:
    exact = load_sdxl(ModelSource("emoji"), device="cpu")
    mixed = load_sdxl(ModelSource("emoji"), device="cpu", dtype="bfloat16", vae_dtype="float32")
    assert mixed.pipeline.unet.dtype == torch.bfloat16
    for name, weight in mixed.pipeline.vae.state_dict().items():
        assert torch.equal(weight, exact.pipeline.vae.state_dict()[name])
    latents = draw(mixed, replace(SETTINGS, dtype="bfloat16"))[1]
    pixels = [prepared(model, SETTINGS).decode(latents.to(model.pipeline.unet.dtype)) for model in (mixed, exact)]
    np.testing.assert_array_equal(*pixels)
    half = load_sdxl(ModelSource("emoji"), device="cpu", dtype="bfloat16")
    rough = prepared(half, SETTINGS).decode(latents)
    # 8 bits of mantissa over the range of a pixel, a few layers deep.
    assert np.abs(rough.astype(int) - pixels[0]).mean() < 2


def compiled_parts(model: SdxlModel) -> list[torch.nn.Module]:
    return [part for part in model.pipeline.unet.modules() if part._compiled_call_impl is not None]


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_what_is_compiled_draws_the_same_and_is_taken_back(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run as it was traced: inductor takes minutes to build it, see the benchmark."""
    really = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: really(self, backend="aot_eager", **more))
    model, settings = load_sdxl(ModelSource("emoji"), device="cpu"), replace(SETTINGS, steps=1, batch_size=1)
    plain = draw(model, settings)[1]
    switched = replace(settings, acceleration=Acceleration(compile=mode))
    assert_rounding_only(draw(model, switched)[1], plain)
    names = {type(part).__name__ for part in compiled_parts(model)}
    assert names == {"UNet2DConditionModel" if mode == "full" else "BasicTransformerBlock"}
    assert torch.equal(draw(model, settings)[1], plain)
    assert not compiled_parts(model)


def test_what_is_compiled_has_the_attention_kernel_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also another model of the same code, for which dynamo takes what it traced before."""
    really = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: really(self, backend="aot_eager", **more))
    settings = replace(SETTINGS, steps=1, batch_size=1, acceleration=Acceleration(compile="regional"))
    models = [load_sdxl(ModelSource("emoji"), device="cpu") for _ in range(2)]
    for model, name in ((models[0], "flash"), (models[0], "math"), (models[1], "flash"), (models[0], "math")):
        model.encode_prompts([*TEXTS, ""])
        draw(model, replace(settings, attention=name))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            draw(model, replace(settings, attention=name))
        # Traced, "math" is the products that it consists of.
        flash = any("flash_attention" in event.key for event in seen.key_averages())
        assert flash == (name == "flash")


def test_cuda_graphs_need_cuda(model: SdxlModel) -> None:
    with pytest.raises(InvalidInput, match="needs a CUDA device, and this is cpu"):
        draw(model, by(cuda_graphs=True))


def test_a_recording_and_its_replay_are_of_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU shows it: on the current device's streams, another device's kernels are not recorded."""
    inside: list[torch.device] = []
    done: list[str] = []

    @contextmanager
    def device(entered: torch.device) -> Iterator[None]:
        inside.append(entered)
        yield
        inside.pop()

    cuda = MagicMock()
    cuda.device = device
    cuda.CUDAGraph.return_value.replay.side_effect = lambda: done.append(f"replayed in {inside}")
    cuda.graph.return_value.__enter__.side_effect = lambda: done.append(f"recorded in {inside}")
    monkeypatch.setattr("popalign_core.models.cuda_graphs.torch.cuda", cuda)
    rows = torch.ones(2, 3)
    unet = GraphedUnet(lambda sample, *_, **__: (sample * 2,))
    unet(rows, torch.tensor(5), encoder_hidden_states=rows, added_cond_kwargs={})
    place = [rows.device]
    assert done == [f"recorded in {place}", f"replayed in {place}"]
    cuda.Stream.assert_called_once_with(rows.device)
    assert {call.args for call in cuda.current_stream.call_args_list} == {(rows.device,)}
    assert cuda.graph.call_args.kwargs == {"stream": cuda.Stream.return_value}


def test_fused_projections_and_a_lora_are_no_configuration() -> None:
    with pytest.raises(ValueError, match="leaves out a LoRA"):
        RunConfig.model_validate({"acceleration": {"fused_projections": True}, "alignment": {"lora_rank": 4}})


def test_facts_name_every_setting_and_their_differences_all_but_the_model(model: SdxlModel) -> None:
    facts = sampler_facts(model, SETTINGS)
    assert {"model", "scheduler", "steps", "guidance_scale", "dtype", "attention", "compile", "batch_size"} <= set(
        facts
    )
    assert {"torch", "diffusers", "device", "vae_dtype", "channels_last", "height"} <= set(facts)
    assert facts["height"] == "64"
    other = {**sampler_facts(model, replace(SETTINGS, batch_size=8)), "model": "another"}
    assert sampler_differences([facts, other, facts]) == {"batch_size": ("3", "8"), "vae_batch": ("3", "8")}
    assert sampler_differences([facts, {**facts, "model": "another"}]) == {}
    assert sampler_differences([facts, {"sampler": "not recorded"}])["steps"] == ("2", "not recorded")


def test_channels_last_is_for_gpus_unless_it_is_asked_for() -> None:
    cases = {("auto", "cpu"): False, ("auto", "cuda"): True, ("on", "cpu"): True, ("off", "cuda"): False}
    assert {
        (layout, device): Acceleration(channels_last=layout).in_channels_last(device) for layout, device in cases
    } == cases
