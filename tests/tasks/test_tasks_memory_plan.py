"""A run is refused before anything is loaded where its device has too little memory, and says the way out."""

import pytest
import torch

from flows.cli import run
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput
from popalign_core.execution import AUTO, Execution
from popalign_core.presets import preset
from tasks import memory_plan
from tasks.memory_plan import GIB, NotEnoughMemory, Room, memory_rows, require_memory, stage_footprint, training_shape

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
