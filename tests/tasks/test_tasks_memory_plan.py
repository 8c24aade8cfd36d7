"""A run is refused before anything is loaded where its device has too little memory, and says the way out."""

import pytest
import torch
from tiny_pipelines import write_stable_diffusion, write_stable_diffusion_3

from flows.cli import run
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput
from popalign_core.execution import AUTO, Execution
from popalign_core.models import architecture
from popalign_core.presets import preset
from tasks import memory_plan
from tasks.memory_plan import (
    GIB,
    NotEnoughMemory,
    Room,
    memory_rows,
    require_memory,
    sampling_shape,
    stage_footprint,
    training_shape,
)
from tasks.plan import planned_work

CONFIG = with_settings(preset("emoji"), {"device": "cpu"})


def have(monkeypatch: pytest.MonkeyPatch, size: float, where: str = "this machine's memory") -> None:
    monkeypatch.setattr(memory_plan, "room_of", lambda _: Room(size, where))


def changed(**settings: object) -> RunConfig:
    return with_settings(CONFIG, {name.replace("__", "."): str(value) for name, value in settings.items()})


def test_what_fits_passes_and_what_does_not_is_refused_with_the_way_out(monkeypatch):
    need = {stage: stage_footprint(CONFIG, stage).bytes for stage in memory_plan.STAGES}
    have(monkeypatch, max(need.values()))
    require_memory(CONFIG, AUTO, *memory_plan.STAGES)
    have(monkeypatch, need["training"] - 1)
    with pytest.raises(NotEnoughMemory, match=r"training of emoji needs .* GiB .*nothing was loaded") as refusal:
        require_memory(CONFIG, AUTO, "training")
    for part in ("gradients", "AdamW's moments", "alignment.lora_rank=16", "--set execution.memory_check=false"):
        assert part in str(refusal.value)
    require_memory(CONFIG, Execution(memory_check=False), "training")


def test_on_a_gpu_what_stays_beside_the_samplers_model_is_not_free(monkeypatch):
    """A card with 60 free; of 40 reserved 25 are in use, 10 of them by the model that leaves."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(memory_plan, "pick_device", lambda _: card)
    monkeypatch.setattr(memory_plan.loaded_model, "bytes_on", {card: 10}.__getitem__)
    facts = {"mem_get_info": (60, 100), "memory_reserved": 40, "memory_allocated": 25, "get_device_name": "a card"}
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert memory_plan.room_of("auto") == Room(60 + 15 + 10, "cuda (a card)")


def test_on_a_gpu_one_image_must_fit_and_on_a_cpu_the_batch(monkeypatch):
    one, batch = stage_footprint(CONFIG, "sampling", batch=1).bytes, stage_footprint(CONFIG, "sampling").bytes
    assert one < batch / 2
    have(monkeypatch, (one + batch) / 2, "cuda (a card)")
    require_memory(CONFIG, AUTO, "sampling")
    assert any("The batch will be halved until it does." in note for note in memory_rows(CONFIG)[1])
    have(monkeypatch, (one + batch) / 2)
    with pytest.raises(NotEnoughMemory, match=r"smaller sampling\.batch_size"):
        require_memory(CONFIG, AUTO, "sampling")


def test_processes_share_a_step_and_preserved_captions_are_a_third_image():
    assert training_shape(changed(alignment__pairs_per_step=9), 2).pairs == 5
    assert training_shape(CONFIG).images_each == 3
    assert training_shape(changed(alignment__preserve_weight=0)).images_each == 2
    most = stage_footprint(CONFIG, "training").bytes
    assert stage_footprint(CONFIG, "training", processes=4).bytes < most


def test_sharded_processes_need_less_each_and_a_plan_says_what_it_does_not_know(monkeypatch):
    sharded = changed(alignment__sharded=True)
    assert [training_shape(sharded, n).shards for n in (1, 4)] == [1, 4]
    assert training_shape(CONFIG, 4).shards == 1
    one, eight = (stage_footprint(sharded, "training", processes=n).bytes for n in (1, 8))
    assert one == stage_footprint(CONFIG, "training").bytes
    have(monkeypatch, (one + eight) / 2)
    notes = " ".join(memory_rows(sharded)[1])
    assert "Training in one process does not fit" in notes
    assert f"the row is of one process, each of 8 would need {eight / GIB:.1f} GiB" in notes
    assert "alignment.sharded divides" not in " ".join(memory_rows(CONFIG)[1])
    require_memory(sharded, Execution(training_processes=4, training_hosts=2), "training")
    with pytest.raises(NotEnoughMemory, match=r"alignment\.sharded=true in several processes"):
        require_memory(sharded, AUTO, "training")


def test_a_command_is_refused_before_it_begins(monkeypatch, tmp_path):
    have(monkeypatch, 1000.0)
    with pytest.raises(NotEnoughMemory, match="sampling of emoji needs"):
        run("emoji", "night", tmp_path / "workspace")
    assert not list((tmp_path / "workspace").glob("runs/*"))


def test_a_plan_says_what_is_needed_and_that_it_will_be_refused(monkeypatch):
    have(monkeypatch, 1000.0)
    rows, notes = memory_rows(CONFIG)
    assert [row.stage for row in rows] == ["sampling", "training"]
    assert rows[0].needed == f"{stage_footprint(CONFIG, 'sampling').bytes / GIB:.1f} GiB"
    assert "UNet" in rows[0].parts
    assert sum("It will be refused" in note for note in notes) == 2
    other = changed(device="cuda:7")
    monkeypatch.undo()
    # A device of another machine is no reason against a plan.
    assert any("There is no GPU here" in note for note in memory_rows(other)[1])
    with pytest.raises(InvalidInput):
        require_memory(other, AUTO, "sampling")


FAMILIES = {
    "SDXL": (lambda _: "emoji", "ddim", "UNet"),
    "noise": (write_stable_diffusion, "ddim", "UNet"),
    "flow": (write_stable_diffusion_3, "flow-euler", "transformer"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", [0, 4])
def test_every_family_is_planned_and_refused_by_its_own_figures(family, rank, tmp_path, monkeypatch):
    write, scheduler, name = FAMILIES[family]
    settings = {"model": write(tmp_path / "model"), "sampling__scheduler": scheduler, "alignment__lora_rank": rank}
    config = changed(expansion__max_subjects=1, **settings)
    rows, notes = memory_rows(config)
    assert "the model's files" in notes[0]
    assert all(row.parts.startswith(f"{name} ") for row in rows)
    counted = [
        row for row in planned_work(config, str(tmp_path / "none")).rows if row.stage in ("sampling", "alignment")
    ]
    assert all(row.flop > 0 for row in counted)
    have(monkeypatch, 1e12)
    require_memory(config, AUTO, *memory_plan.STAGES)
    have(monkeypatch, 1000.0)
    for stage in memory_plan.STAGES:
        with pytest.raises(NotEnoughMemory, match=f"{stage} of .*{name}"):
            require_memory(config, AUTO, stage)


def test_a_model_that_is_not_known_is_planned_without_memory_and_runs_unchecked(tmp_path, monkeypatch):
    def out_of_reach(model: str, name: str) -> None:
        raise OSError(f"no hub here for {model}/{name}")

    monkeypatch.setattr(architecture, "_from_hub", out_of_reach)
    config = changed(expansion__max_subjects=1, model="somebody/sd3-unheard-of", sampling__keep_latents=True)
    have(monkeypatch, 1000.0)
    require_memory(config, AUTO, *memory_plan.STAGES)
    rows, notes = memory_rows(config)
    assert rows == []
    assert notes[0].startswith("Memory and arithmetic are not counted for somebody/sd3-unheard-of")
    plan = planned_work(config, str(tmp_path / "none"))
    assert plan.total.flop == 0
    (latents,) = (row for row in plan.rows if row.work == "latents")
    assert latents.rate.startswith("stated default")
    # SDXL is known without its files.
    sdxl = memory_rows(preset("sdxl"))
    assert len(sdxl[0]) == 2
    assert "SDXL's configuration, as shipped" in sdxl[1][0]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"sampling__approximate__fp8_weights": True}, {"fp8_weights": True}),
        ({"acceleration__vae_dtype": "bfloat16"}, {"vae_dtype": "bfloat16"}),
        ({"acceleration__fused_projections": True}, {"fused_projections": True}),
        ({"acceleration__cuda_graphs": True}, {"cuda_graphs": True}),
        ({"acceleration__vae_batch": 2}, {"decoded": 2}),
        ({"sampling__attention": "math"}, {"math_attention": True}),
    ],
)
def test_what_changes_the_memory_of_sampling_is_planned(setting, wanted):
    before, after = sampling_shape(CONFIG), sampling_shape(changed(**setting))
    assert {name: getattr(after, name) for name in wanted} == wanted
    assert after != before


def test_text_encoders_stay_in_the_memory_of_a_cpu_alone():
    here, there = (stage_footprint(CONFIG, "sampling", on_cpu=cpu) for cpu in (True, False))
    assert "text encoders" in dict(here.parts)
    assert "text encoders" not in dict(there.parts)
    assert stage_footprint(CONFIG, "sampling") == here
    assert stage_footprint(changed(device="cuda:7"), "sampling") == there


def test_images_are_encoded_by_so_many_pixels_at_once():
    assert training_shape(CONFIG).encoded == 64
    assert training_shape(preset("sdxl")).encoded == 2
    assert training_shape(changed(sampling__keep_latents=True)).encoded == 0


def test_a_policy_gradient_has_a_shape_of_its_own_that_micro_batches_lessen(monkeypatch):
    reward = changed(alignment__objective="reward", reward__group_size=12, reward__trained_steps=3)
    shape = training_shape(reward)
    assert (shape.pairs, shape.images_each) == (36, 2)
    assert shape.drawn is not None
    assert (shape.drawn.at_once, shape.drawn.steps, shape.drawn.groups) == (12, CONFIG.sampling.steps, 6)
    assert shape.drawn.builder_bytes > 0
    small = with_settings(reward, {"alignment.micro_batch": "2"})
    assert stage_footprint(small, "training").bytes < stage_footprint(reward, "training").bytes
    assert "36 steps of images a pass" in memory_rows(reward)[0][1].setting
    have(monkeypatch, 1000.0)
    with pytest.raises(NotEnoughMemory, match=r"alignment\.micro_batch=1.*another alignment\.objective"):
        require_memory(reward, AUTO, "training")
