"""Memory and arithmetic that are counted without weights are those of a computation with them."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_pipelines import write_stable_diffusion, write_stable_diffusion_3
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from popalign_core.live_memory import count_use
from popalign_core.models.architecture import (
    Architecture,
    architecture_of,
    meta_denoiser,
    sdxl_as_shipped,
)
from popalign_core.models.attention import attention_backend
from popalign_core.models.denoisers import sharded_groups
from popalign_core.models.footprint import SamplingShape, network_call, sampling_footprint, vae_number
from popalign_core.models.training_footprint import (
    DrawnGroups,
    TrainingShape,
    prepare_training,
    training_footprint,
    training_step,
)

SDXL = sdxl_as_shipped()
SMALL_CONFIG = json.loads(SDXL.denoiser) | {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "cross_attention_dim": 64,
}
SMALL = replace(SDXL, denoiser=json.dumps(SMALL_CONFIG))
CONDITIONING = SDXL.family.conditioning
EMOJI = architecture_of("emoji")
LATENTS, IMAGES = 32, 2
# The CPU's convolutions keep nothing that a GPU's would, and its attention pads; seen: 0.4% to 5%.
TOLERANCE = 0.1


def shape(**changes: object) -> TrainingShape:
    values = {"side": 0, "pairs": 1, "dtype": "float32", "lora_rank": 0, "trainable": "all", "checkpointing": False}
    return TrainingShape(**(values | changes))  # type: ignore[arg-type]


def drawing(**changes: object) -> SamplingShape:
    values = {"side": 0, "batch": 4, "decoded": 4, "dtype": "bfloat16", "passes": 20, "guided": True}
    return SamplingShape(**(values | changes))  # type: ignore[arg-type]


def sampling(model: Architecture, **changes: object) -> dict[str, float]:
    return dict(sampling_footprint(model, drawing(**changes)).parts)


def small_unet(*, trained: TrainingShape | None = None) -> UNet2DConditionModel:
    unet = meta_denoiser(SMALL, torch.float32)
    assert isinstance(unet, UNet2DConditionModel)
    if trained is not None:
        prepare_training(unet, trained, CONDITIONING)
    return unet


def allocated_peak(computation) -> int:
    """Of torch's own allocations on the CPU, as its profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        computation()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_live_bytes_are_counted_by_hand():
    given = torch.ones(1000)  # made before, so not counted

    def computation() -> None:
        kept = given * 2
        kept.view(10, 100).add_(1)  # a view and an update in place take nothing
        for _ in range(3):
            (kept + 1).sum()  # freed again each time; the sum has 4 bytes

    used = count_use(computation)
    assert used.peak_bytes == 4000 + 4000 + 4
    assert count_use(lambda: given.reshape(10, 100) @ given.reshape(100, 10)).flop == 2 * 10 * 100 * 10


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_takes_what_was_counted(checkpointing):
    meta, real = small_unet(), UNet2DConditionModel.from_config(SMALL_CONFIG)
    for unet in (meta, real):
        prepare_training(unet, shape(checkpointing=checkpointing), CONDITIONING)
    counted, _ = training_step(meta, LATENTS, IMAGES)
    call = network_call(real, LATENTS, IMAGES)
    peak = allocated_peak(lambda: call().float().square().mean().backward())
    assert counted.peak_bytes == pytest.approx(peak, rel=TOLERANCE)


def test_checkpointing_takes_less_memory_and_more_arithmetic():
    found = []
    for checkpointing in (False, True):
        found.append(training_step(small_unet(trained=shape(checkpointing=checkpointing)), LATENTS, IMAGES)[0])
    assert found[1].peak_bytes < 0.7 * found[0].peak_bytes
    assert 1.15 < found[1].flop / found[0].flop < 1.35


def test_sdxl_is_the_known_size():
    found = sampling_footprint(SDXL, drawing(batch=1, decoded=1, passes=100))
    parts = dict(found.parts)
    assert parts["UNet"] == 2 * 2_567_463_684
    assert parts["VAE"] == 2 * 83_653_863
    # 100 passes of 6.7612 TFLOP and 10.470 of the VAE.
    assert found.flop == pytest.approx(686.59e12, rel=1e-4)


def test_what_stays_in_training_is_counted_by_hand():
    elements = sum(p.numel() for p in meta_denoiser(EMOJI, torch.float32).parameters())
    full = dict(training_footprint(EMOJI, shape(averaged=True)).parts)
    assert [full[name] for name in ("UNet", "reference", "gradients")] == [4 * elements] * 3
    assert (full["AdamW's moments"], full["copies of what is trained"]) == (8 * elements, 4 * elements)
    part = dict(training_footprint(EMOJI, shape(trainable="conditioning")).parts)
    assert part["gradients"] < full["gradients"] / 2
    lora = dict(training_footprint(EMOJI, shape(lora_rank=4, dtype="bfloat16", further=True)).parts)
    assert lora["UNet"] == 2 * elements
    assert "reference" not in lora
    assert lora["copies of what is trained"] == lora["LoRA"] == lora["gradients"]
    eight = dict(training_footprint(EMOJI, shape(eight_bit=True, mixed=True)).parts)
    assert (eight["AdamW's moments"], eight["reference"]) == (2 * elements, 2 * elements)


def test_sharded_processes_divide_what_stays_and_gather_a_group_at_a_time():
    elements = sum(p.numel() for p in meta_denoiser(EMOJI, torch.float32).parameters())
    whole, part = (dict(training_footprint(EMOJI, shape(averaged=True, shards=n)).parts) for n in (1, 4))
    for name in ("UNet", "reference", "gradients", "AdamW's moments", "copies of what is trained"):
        assert part[name] == whole[name] / 4
    assert part["VAE"] == whole["VAE"]
    groups = sharded_groups(meta_denoiser(EMOJI, torch.float32))
    sizes = [sum(p.numel() for p in group.parameters()) for group in groups]
    # Weights and gradients, of a group, the next one, and what is in none.
    assert part["gathered for a moment"] == 8 * (elements - sum(sizes) + 2 * max(sizes))
    # One of very many processes still loads the whole model.
    many = training_footprint(EMOJI, shape(mixed=True, checkpointing=True, shards=10**6))
    assert many.bytes >= 4 * elements + whole["VAE"] + 4 * EMOJI.text_elements
    passing = [
        dict(training_footprint(EMOJI, shape(mixed=True, checkpointing=c, shards=4)).parts) for c in (False, True)
    ]
    assert passing[0]["weights to compute with"] == 2 * elements
    assert "weights to compute with" not in passing[1]


def test_gradients_that_leave_as_they_come_are_not_in_the_peak():
    found = []
    for keep in (True, False):
        unet = small_unet(trained=shape(checkpointing=True))
        found.append(training_step(unet, 8, 1, keep_gradients=keep)[0].peak_bytes)
    assert found[1] < found[0]


# --- what changes the memory of sampling ---


def test_weights_in_8_bits_are_half_and_those_of_normalization_stay():
    many = {"batch": 64, "decoded": 64}
    before, after = sampling(EMOJI, **many), sampling(EMOJI, fp8_weights=True, **many)
    assert 0.5 < after["UNet"] / before["UNet"] < 0.55
    # They are whole as they are loaded: with few activations that is the peak.
    assert sampling(EMOJI, batch=1, decoded=1, fp8_weights=True)["UNet"] == before["UNet"]


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float32),  # SDXL's overflows
        ({"dtype": "float16", "vae_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "vae_dtype": "float32"}, torch.float32),
    ],
)
def test_the_vae_is_counted_in_the_format_that_it_is_loaded_in(settings, number):
    assert vae_number(SDXL, **settings) == number
    overflows = replace(EMOJI, vae=json.dumps(json.loads(EMOJI.vae) | {"force_upcast": True}))
    found, plain = sampling(overflows, **settings), sampling(EMOJI)
    for name in ("VAE", "activations of the VAE"):
        assert found[name] / plain[name] == pytest.approx(number.itemsize / 2, rel=0.01)


def test_fused_projections_lie_beside_the_single_ones():
    unet = small_unet()
    single = sum(p.numel() for p in unet.parameters())
    attention = [module for module in unet.modules() if type(module).__name__ == "Attention"]
    # Query, key and value of self-attention, key and value of the caption's.
    added = sum(
        layer.weight.numel()
        for module in attention
        for layer in ((module.to_k, module.to_v) if module.is_cross_attention else (module.to_q,) * 3)
    )
    assert sampling(SMALL, side=64, fused_projections=True)["UNet"] == 2 * (single + added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_keeps_its_matrix_takes_what_was_counted(dtype):
    shape = (2, 4, 256, 32)
    inputs = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    meta = [part.to("meta") for part in inputs]
    whole = count_use(lambda: functional.scaled_dot_product_attention(*meta), whole_attention=True)
    with attention_backend("math"), torch.no_grad():
        peak = allocated_peak(lambda: functional.scaled_dot_product_attention(*inputs))
    assert whole.peak_bytes == pytest.approx(peak, rel=0.05)
    assert sampling_footprint(EMOJI, drawing(math_attention=True)).bytes > sampling_footprint(EMOJI, drawing()).bytes


def test_a_graph_keeps_its_memory_while_images_are_decoded():
    found, plain = sampling(EMOJI, cuda_graphs=True), sampling(EMOJI)
    assert found["activations of the VAE"] == plain["activations of the VAE"]
    denoising = sampling(EMOJI, decoded=1, vae_dtype="bfloat16", side=64, math_attention=True)
    assert "activations of the UNet" in denoising
    both = sampling(EMOJI, decoded=1, side=64, math_attention=True, cuda_graphs=True)
    assert both["the CUDA graph's own"] == denoising["activations of the UNet"]


def test_text_encoders_are_on_a_gpu_only_while_they_encode():
    few, many = sampling(SDXL, batch=1, decoded=1), sampling(SDXL, batch=2, decoded=2)
    assert few["text encoders"] == 2 * SDXL.text_elements
    assert not any("activations" in name for name in few)
    assert "text encoders" not in many
    assert sampling(SDXL, batch=2, decoded=2, encoders_stay=True) == many | {"text encoders": 2 * SDXL.text_elements}
    for stays in (False, True):
        parts = dict(training_footprint(EMOJI, shape(encoders_stay=stays)).parts)
        assert ("text encoders" in parts) is stays
    # A LoRA on a small image may take less than its captions' encoders did.
    assert "text encoders" in dict(training_footprint(SDXL, shape(side=64, lora_rank=1, dtype="bfloat16")).parts)


# --- a policy gradient ---


def test_a_policy_gradient_draws_and_learns_and_both_are_counted():
    drawn = DrawnGroups(groups=2, images=64, at_once=64, steps=10, trained=3, builder_bytes=1000.0)
    group = shape(pairs=192, drawn=drawn, images_each=1)
    whole = dict(training_footprint(EMOJI, group).parts)
    assert whole["classifier"] == 1000
    assert whole["drawn states"] == 11 * 2 * 64 * EMOJI.latent_elements(0) * 4
    # With few steps in a pass what is drawn at once is the most; micro-batches make that less as well.
    steps_alone = replace(group, pairs=1)
    assert "activations of the VAE" in dict(training_footprint(EMOJI, steps_alone).parts)
    each = replace(steps_alone, drawn=replace(drawn, at_once=1))
    found = [training_footprint(EMOJI, one).bytes for one in (group, steps_alone, each)]
    assert found[2] < found[1] < found[0]
    # Passes are never mixed: no copy of the weights to compute with, but a reference in 16 bits.
    mixed = dict(training_footprint(EMOJI, replace(group, mixed=True)).parts)
    assert "weights to compute with" not in mixed
    assert (mixed["activations"], mixed["reference"]) == (whole["activations"], whole["reference"] / 2)


@pytest.mark.parametrize("write", [write_stable_diffusion, write_stable_diffusion_3])
def test_every_family_takes_in_training_what_was_counted(write, tmp_path):
    model = architecture_of(str(write(tmp_path / "model")))
    meta = meta_denoiser(model, torch.float32)
    real = getattr(diffusers, model.family.network).from_config(json.loads(model.denoiser))
    for network in (meta, real):
        prepare_training(network, shape(), model.family.conditioning)
    counted, _ = training_step(meta, 8, 4)
    call = network_call(real, 8, 4)
    peak = allocated_peak(lambda: call().float().square().mean().backward())
    assert counted.peak_bytes == pytest.approx(peak, rel=0.15)
