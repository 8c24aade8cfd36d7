"""Every family draws what its pipeline draws, trains on its own schedule, and is refused what does not fit it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from tiny_pipelines import write_stable_diffusion, write_stable_diffusion_3

from popalign_core.alignment.adapters import trainable_parameters
from popalign_core.alignment.denoiser import FlowSchedule, NoiseSchedule, Schedule
from popalign_core.errors import InvalidInput, ModelNotUsable, UnknownName
from popalign_core.models.checkpoints import check_source
from popalign_core.models.denoisers import flow_schedule_of
from popalign_core.models.families import FAMILIES
from popalign_core.models.loading import load_model
from popalign_core.models.sdxl import SCHEDULERS, ModelSource
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.models.trainable import make_policy, save_weights
from popalign_core.sampling import ImageRequest, SamplingSettings, prepared, sample_images

Writer = Callable[[Path], Path]
WRITERS: dict[str, Writer] = {
    "noise": write_stable_diffusion,
    "velocity": lambda folder: write_stable_diffusion(folder, "v_prediction"),
    "flow": write_stable_diffusion_3,
    "flow without T5": lambda folder: write_stable_diffusion_3(folder, t5=False, dynamic_shift=True),
}
CAPTION = "a photo of a judge"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write(root / name) for name, write in WRITERS.items()}


def fitting(model: TextToImageModel) -> SamplingSettings:
    return SamplingSettings(model.family.schedulers[0], 2, 3.0, 0, 0, 1, "float32", "default")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_picture_is_what_the_plain_pipeline_draws(kind: str, folders: dict[str, Path]) -> None:
    model = load_model(ModelSource(str(folders[kind])), device="cpu")
    (drawn,) = next(sample_images(model, [ImageRequest("s", "p", CAPTION, 0, 3)], fitting(model)))
    missing = {"text_encoder_3": None, "tokenizer_3": None} if kind == "flow without T5" else {}
    plain = getattr(diffusers, model.family.pipeline).from_pretrained(folders[kind], **missing)
    plain.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    image = plain(CAPTION, num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np").images[0]
    assert drawn.pixels.std() > 10
    assert np.abs(np.round(image * 255) - drawn.pixels).max() <= 1


def own_schedulers(folder: Path, kind: type, **changed: object) -> dict[str, Any]:
    """What the sampler draws with, by name, where the checkpoint's own scheduler is of this kind."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | {"_class_name": kind.__name__}
    del config["clip_sample"]
    model = load_model(ModelSource(str(folder)), device="cpu")
    model.pipeline.scheduler = kind.from_config(config | changed)
    settings = fitting(model)
    return {name: prepared(model, replace(settings, scheduler=name)).scheduler for name in model.family.schedulers}


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_latents_are_not_clipped_as_pixels_are(kind: type, folders: dict[str, Path]) -> None:
    schedulers = own_schedulers(folders["noise"], kind)
    assert [schedulers[name].config.clip_sample for name in ("ddim", "lcm")] == [False, False]
    schedulers["ddim"].set_timesteps(4)
    noisy = torch.full((1, 4, 2, 2), 9.0)
    (_, clean) = schedulers["ddim"].step(
        torch.zeros_like(noisy), schedulers["ddim"].timesteps[-1], noisy, return_dict=False
    )
    assert clean.min() > 1


def test_what_the_checkpoints_own_ddim_says_of_clipping_holds(folders: dict[str, Path]) -> None:
    for clipped in (False, True):
        schedulers = own_schedulers(folders["noise"], DDIMScheduler, clip_sample=clipped)
        assert [schedulers[name].config.clip_sample for name in ("ddim", "lcm")] == [clipped, clipped]


def test_drawing_leaves_the_checkpoints_scheduler_as_it_is(folders: dict[str, Path]) -> None:
    """Or what the next sampler is made from would depend on those before."""
    model = load_model(ModelSource(str(folders["noise"])), device="cpu")
    for name in model.family.schedulers:
        prepared(model, replace(fitting(model), scheduler=name))
        assert type(model.pipeline.scheduler) is DDIMScheduler


def test_a_flow_is_noised_and_shifted_as_by_its_scheduler() -> None:
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule, steps = flow_schedule_of(scheduler, tokens=64), torch.tensor([0, 400, 999])
    expected = scheduler.scale_noise(clean, scheduler.timesteps.flip(0)[steps], noise)
    torch.testing.assert_close(schedule.add_noise(clean, noise, steps), expected)

    # At the largest resolution s = exp(max_shift); drawing, which leaves its steps in the scheduler, changes nothing.
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=4096, max_shift=1.15)
    dynamic.set_timesteps(4, mu=0.3)
    plain, scale = torch.linspace(0.001, 1, 1000), torch.tensor(1.15).exp()
    torch.testing.assert_close(flow_schedule_of(dynamic, 4096).sigmas, scale * plain / (1 + (scale - 1) * plain))


def test_all_predictions_of_one_process_have_one_bound() -> None:
    """The noise that a wrong velocity stands for is wrong by the signal's scale times as much."""
    sigmas = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    signal = (1 - sigmas).square() / ((1 - sigmas).square() + sigmas.square())  # as much signal to noise
    schedules: list[Schedule] = [NoiseSchedule(signal), NoiseSchedule(signal, "v_prediction"), FlowSchedule(sigmas)]
    noise, velocity, flow = (schedule.error_weights() for schedule in schedules)
    torch.testing.assert_close(velocity, noise * signal[1:])
    torch.testing.assert_close(flow, noise * (1 - sigmas[1:]).square())
    assert torch.isfinite(FlowSchedule(torch.linspace(0.1, 1, 10)).error_weights()).all()


def test_the_transformer_is_told_the_share_of_noise(folders: dict[str, Path]) -> None:
    model = load_model(ModelSource(str(folders["flow"])), device="cpu")
    policy, rows = make_policy(model, lora_rank=2, seed=0), model.encode_prompts([CAPTION])
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = policy.denoiser(noisy, torch.tensor([400]), rows.context, rows.pooled)
        sigma = model.schedule().sigmas[400] * 1000
        theirs = model.network(noisy, rows.context, rows.pooled, sigma[None], return_dict=False)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["velocity", "flow"])
def test_an_adapter_goes_on_and_is_fused_as_it_was_saved(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(ModelSource(str(folders[kind])), device="cpu")
    policy, rows = make_policy(model, lora_rank=2, seed=0), model.encode_prompts([CAPTION])
    with torch.no_grad():
        for parameter in trainable_parameters(policy.denoiser).values():
            parameter.add_(0.1)
    save_weights(policy, tmp_path, lora=True)

    def predicted(source: ModelSource, **options: Path) -> torch.Tensor:
        other = make_policy(load_model(source, device="cpu"), lora_rank=2, seed=1, **options)
        noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return other.denoiser(noisy, torch.tensor([400]), rows.context, rows.pooled)

    plain, lora = ModelSource(str(folders[kind])), tmp_path / "lora"
    again, fused = predicted(plain, earlier_lora=lora), predicted(replace(plain, fused_lora=str(lora)))
    torch.testing.assert_close(again, fused, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(again, predicted(plain), atol=1e-2)


def test_the_conditioning_of_a_transformer_is_the_captions_side(folders: dict[str, Path]) -> None:
    """Its attn2 is self-attention of the image; in a UNet that name means the caption."""
    for rank in (0, 2):
        model = load_model(ModelSource(str(folders["flow"])), device="cpu")
        policy = make_policy(model, lora_rank=rank, trainable="conditioning", seed=0)
        names = list(trainable_parameters(policy.denoiser))
        assert any(".add_k_proj." in name for name in names)
        assert not any(".attn2." in name or ".to_k." in name for name in names)


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_a_scheduler_of_another_family_is_refused_with_those_that_fit(kind: str, folders: dict[str, Path]) -> None:
    model = load_model(ModelSource(str(folders[kind])), device="cpu")
    for name in SCHEDULERS.keys() - set(model.family.schedulers):
        with pytest.raises(UnknownName, match=f"{name}.*Known: {model.family.schedulers[0]}"):
            check_source(str(folders[kind]), scheduler=name)
        with pytest.raises(UnknownName, match=f"sampling.scheduler for {model.family.title}"):
            next(sample_images(model, [], replace(fitting(model), scheduler=name)), None)


def test_a_size_without_positions_is_refused(folders: dict[str, Path]) -> None:
    check_source(str(folders["flow"]), 96)
    with pytest.raises(InvalidInput, match="beyond the 96 pixels"):
        check_source(str(folders["flow"]), 104)
    with pytest.raises(InvalidInput, match="not divisible by 8"):
        check_source(str(folders["flow"]), 60)


@pytest.mark.parametrize(
    ("kind", "part", "changed", "said"),
    [
        ("noise", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "derived for epsilon and v_predic"),
        ("noise", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "must be v_prediction"),
        ("noise", "unet/config.json", {"in_channels": 9}, "inpainting"),
        ("noise", "unet/config.json", {"addition_embed_type": "text_time"}, "Stable Diffusion 1 and 2 has None"),
        ("flow", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscrete"),
        ("flow", "model_index.json", {"_class_name": "FluxPipeline"}, ", ".join(FAMILIES)),
    ],
)
def test_what_the_losses_are_not_derived_for_is_refused(
    kind: str, part: str, changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = WRITERS[kind](tmp_path)
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ModelNotUsable, match=said):
        check_source(str(folder))
