"""Memory and arithmetic that are counted without weights are those of a computation with them."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.profiler import ProfilerActivity, profile

from popalign_core.live_memory import count_use
from popalign_core.models import architecture, footprint
from popalign_core.models.architecture import architecture_of, meta_unet
from popalign_core.models.denoisers import sharded_groups
from popalign_core.models.footprint import (
    TrainingShape,
    prepare_training,
    sampling_footprint,
    training_footprint,
    training_step,
    unet_call,
)

SDXL = architecture_of("somebody/sdxl")
SMALL = json.dumps(
    json.loads(SDXL.unet)
    | {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 64,
    }
)
LATENTS, IMAGES = 32, 2
# The CPU's convolutions keep nothing that a GPU's would, and its attention pads; seen: 0.4% to 5%.
TOLERANCE = 0.1


def shape(**changes: object) -> TrainingShape:
    values = {"side": 0, "pairs": 1, "dtype": "float32", "lora_rank": 0, "trainable": "all", "checkpointing": False}
    return TrainingShape(**(values | changes))  # type: ignore[arg-type]


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
    meta, real = meta_unet(SMALL, torch.float32), UNet2DConditionModel.from_config(json.loads(SMALL))
    for unet in (meta, real):
        prepare_training(unet, shape(checkpointing=checkpointing))
    counted, _ = training_step(meta, LATENTS, IMAGES)
    call = unet_call(real, LATENTS, IMAGES)
    peak = allocated_peak(lambda: call().float().square().mean().backward())
    assert counted.peak_bytes == pytest.approx(peak, rel=TOLERANCE)


def test_checkpointing_takes_less_memory_and_more_arithmetic():
    found = []
    for checkpointing in (False, True):
        unet = meta_unet(SMALL, torch.float32)
        prepare_training(unet, shape(checkpointing=checkpointing))
        found.append(training_step(unet, LATENTS, IMAGES)[0])
    assert found[1].peak_bytes < 0.7 * found[0].peak_bytes
    assert 1.15 < found[1].flop / found[0].flop < 1.35


def test_sdxl_is_the_known_size():
    sampling = sampling_footprint(SDXL, side=0, batch=1, decoded=1, dtype="bfloat16", passes=100, guided=True)
    parts = dict(sampling.parts)
    assert parts["UNet"] == 2 * 2_567_463_684
    assert parts["VAE"] == 2 * 83_653_863
    # 100 passes of 6.7612 TFLOP and 10.470 of the VAE.
    assert sampling.flop == pytest.approx(686.59e12, rel=1e-4)


def test_what_stays_in_training_is_counted_by_hand():
    emoji = architecture_of("emoji")
    elements = sum(p.numel() for p in meta_unet(emoji.unet, torch.float32).parameters())
    full = dict(training_footprint(emoji, shape(averaged=True)).parts)
    assert [full[name] for name in ("UNet", "reference", "gradients")] == [4 * elements] * 3
    assert (full["AdamW's moments"], full["copies of what is trained"]) == (8 * elements, 4 * elements)
    part = dict(training_footprint(emoji, shape(trainable="conditioning")).parts)
    assert part["gradients"] < full["gradients"] / 2
    lora = dict(training_footprint(emoji, shape(lora_rank=4, dtype="bfloat16", further=True)).parts)
    assert lora["UNet"] == 2 * elements
    assert "reference" not in lora
    assert lora["copies of what is trained"] == lora["LoRA"] == lora["gradients"]
    eight = dict(training_footprint(emoji, shape(eight_bit=True, mixed=True)).parts)
    assert (eight["AdamW's moments"], eight["reference"]) == (2 * elements, 2 * elements)


def test_sharded_processes_divide_what_stays_and_gather_a_group_at_a_time():
    emoji = architecture_of("emoji")
    elements = sum(p.numel() for p in meta_unet(emoji.unet, torch.float32).parameters())
    whole, part = (dict(training_footprint(emoji, shape(averaged=True, shards=n)).parts) for n in (1, 4))
    for name in ("UNet", "reference", "gradients", "AdamW's moments", "copies of what is trained"):
        assert part[name] == whole[name] / 4
    assert part["VAE and text encoders"] == whole["VAE and text encoders"]
    groups = sharded_groups(meta_unet(emoji.unet, torch.float32))
    sizes = [sum(p.numel() for p in group.parameters()) for group in groups]
    # Weights and gradients, of a group, the next one, and what is in none.
    assert part["gathered for a moment"] == 8 * (elements - sum(sizes) + 2 * max(sizes))
    # One of very many processes still loads the whole model.
    many = training_footprint(emoji, shape(mixed=True, checkpointing=True, shards=10**6))
    loaded = 4 * elements + whole["VAE and text encoders"]
    assert many.bytes >= loaded
    passing = [
        dict(training_footprint(emoji, shape(mixed=True, checkpointing=c, shards=4)).parts) for c in (False, True)
    ]
    assert passing[0]["weights to compute with"] == 2 * elements
    assert "weights to compute with" not in passing[1]


def test_gradients_that_leave_as_they_come_are_not_in_the_peak():
    found = []
    for keep in (True, False):
        unet = meta_unet(SMALL, torch.float32)
        prepare_training(unet, shape(checkpointing=True))
        found.append(training_step(unet, 8, 1, keep_gradients=keep)[0].peak_bytes)
    assert found[1] < found[0]


def test_a_hub_id_that_can_be_reached_gives_its_own_configuration(tmp_path, monkeypatch):
    assert SDXL.source == "SDXL's configuration, as shipped"
    (tmp_path / "config.json").write_text(SMALL)
    monkeypatch.setattr(architecture, "_from_hub", lambda *_: tmp_path / "config.json")
    found = architecture_of("somebody/else")
    assert found.source == "the configuration of somebody/else"
    assert json.loads(found.unet)["block_out_channels"] == [32, 64]
    assert footprint.TOKENS == 77
