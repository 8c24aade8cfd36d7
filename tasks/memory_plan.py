"""What sampling and training take of a device's memory, counted on meta tensors; and the refusal of what cannot fit."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import psutil
import torch

from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.execution import Execution
from popalign_core.models.architecture import architecture_of
from popalign_core.models.checkpoints import EMBEDDED
from popalign_core.models.footprint import Footprint, TrainingShape, sampling_footprint, training_footprint
from popalign_core.models.sdxl import pick_device
from popalign_core.workload import passes_per_image
from tasks.run import loaded_model

Stage = Literal["sampling", "training"]
STAGES: tuple[Stage, ...] = ("sampling", "training")
GIB = 2**30
PLANNED_PROCESSES = 8
WAY_OUT = {
    "sampling": "choose sampling.dtype=bfloat16, or a smaller sampling.batch_size or sampling.image_size",
    "training": (
        "choose alignment.gradient_checkpointing=true, alignment.lora_rank=16, sampling.dtype=bfloat16 with it, "
        "alignment.sharded=true in several processes, or fewer alignment.pairs_per_step"
    ),
}


class NotEnoughMemory(InvalidInput):
    """A stage needs more memory than its device has free."""


@dataclass(frozen=True)
class Room:
    """bytes: free for this process, with what it has taken already. where: for a message."""

    bytes: float
    where: str


@dataclass(frozen=True)
class MemoryRow:
    """stage, what of, GiB in all, and the parts: ready to show."""

    stage: str
    setting: str
    needed: str
    parts: str


def stage_footprint(config: RunConfig, stage: Stage, *, batch: int = 0, processes: int = 1) -> Footprint:
    """Of a stage of a run. batch: of sampling, 0 = the configured one. processes: that share a training step."""
    model = architecture_of(config.model)
    if stage == "training":
        return training_footprint(model, training_shape(config, processes))
    sampling = config.sampling
    count = batch or sampling.batch_size
    return sampling_footprint(
        model,
        side=sampling.image_size,
        batch=count,
        decoded=min(count, config.acceleration.vae_batch or count),
        dtype=sampling.dtype,
        passes=passes_per_image(sampling.drawn_steps, sampling.drawn_guidance),
        guided=sampling.drawn_guidance > 1,
    )


def training_shape(config: RunConfig, processes: int = 1) -> TrainingShape:
    """What a step of a run's training is like in each of its processes."""
    alignment = config.alignment
    share = ceil(alignment.pairs_per_step / processes)
    return TrainingShape(
        side=config.sampling.image_size,
        pairs=min(share, alignment.micro_batch or share),
        dtype=config.sampling.dtype,
        lora_rank=alignment.lora_rank,
        trainable=alignment.trainable,
        checkpointing=alignment.gradient_checkpointing,
        images_each=3 if alignment.preserve_weight else 2,
        mixed=alignment.mixed_precision,
        averaged=alignment.ema_decay is not None,
        further=alignment.redraw and alignment.rounds > 1,
        eight_bit=alignment.optimizer == "adamw_8bit",
        shards=processes if alignment.sharded else 1,
    )


def memory_rows(config: RunConfig) -> tuple[list[MemoryRow], list[str]]:
    """What `popalign plan` shows of memory, and notes: where the numbers come from, and what will not fit here."""
    rows: list[MemoryRow] = []
    notes = [
        f"Memory by calculation on {architecture_of(config.model).source}, without the driver's own (about 1 GiB)."
    ]
    room = _room_for(config)
    for stage in STAGES:
        needed = stage_footprint(config, stage)
        rows.append(MemoryRow(stage, _setting(config, stage), f"{needed.bytes / GIB:.1f} GiB", _parts(needed)))
        if room is not None and needed.bytes > room.bytes:
            fewer = stage == "sampling" and "cuda" in room.where and _fits(config, room)
            what = "Training in one process" if stage == "training" and config.alignment.sharded else stage.capitalize()
            notes.append(
                f"{what} does not fit: {room.bytes / GIB:.1f} GiB are free in {room.where}. "
                + ("The batch will be halved until it does." if fewer else f"It will be refused: {WAY_OUT[stage]}.")
            )
    if config.alignment.sharded:
        notes.append(_sharded_note(config))
    if room is None:
        notes.append("There is no GPU here to compare the memory with.")
    return rows, notes


def _sharded_note(config: RunConfig) -> str:
    each = stage_footprint(config, "training", processes=PLANNED_PROCESSES).bytes / GIB
    return (
        "alignment.sharded divides weights, gradients and moments over the training processes. A plan does not know "
        "their number (execution.training_processes, on each of execution.training_hosts): the row is of one process, "
        f"each of {PLANNED_PROCESSES} would need {each:.1f} GiB."
    )


def require_memory(config: RunConfig, execution: Execution, *stages: Stage) -> None:
    """Refuses a stage that cannot fit on the configured device of this machine. Raises: NotEnoughMemory.

    On a GPU sampling halves its batch until it fits, so one image must.
    """
    if not execution.memory_check:
        return
    room = room_of(config.device)
    for stage in stages if room is not None else ():
        assert room is not None  # or there are no stages
        batch = 1 if "cuda" in room.where else 0
        needed = stage_footprint(config, stage, batch=batch, processes=_processes(execution))
        if needed.bytes > room.bytes:
            raise NotEnoughMemory(
                f"{stage} of {config.model} needs {needed.bytes / GIB:.1f} GiB ({_parts(needed)}), and "
                f"{room.bytes / GIB:.1f} GiB are free in {room.where}; nothing was loaded. Free some, or "
                f"{WAY_OUT[stage]}. To try it all the same: --set execution.memory_check=false."
            )


def room_of(device: str) -> Room | None:
    """Free memory of a device, as torch names it or auto; None for a kind whose memory cannot be asked for."""
    place = pick_device(device)
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        # Of this process's own, the sampler's model makes room for the trainer; classifiers and detectors stay.
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return Room(free + unused + loaded_model.bytes_on(place), f"cuda ({torch.cuda.get_device_name(place)})")
    if place.type == "cpu":
        available = psutil.virtual_memory().available + psutil.Process().memory_info().rss
        return Room(float(available), "this machine's memory")
    return None


def _room_for(config: RunConfig) -> Room | None:
    """Where a plan's run would be, as far as that is here: a large model is taken to be meant for a GPU."""
    if config.device == "auto" and config.model not in EMBEDDED and not torch.cuda.is_available():
        return None
    try:
        return room_of(config.device)
    except InvalidInput:  # a device of another machine
        return None


def _fits(config: RunConfig, room: Room) -> bool:
    return stage_footprint(config, "sampling", batch=1).bytes <= room.bytes


def _processes(execution: Execution) -> int:
    return execution.training_processes * execution.training_hosts


def _setting(config: RunConfig, stage: Stage) -> str:
    if stage == "sampling":
        return f"batch of {config.sampling.batch_size}, {config.sampling.dtype}"
    alignment, shape = config.alignment, training_shape(config)
    kind = f"LoRA {alignment.lora_rank}" if alignment.lora_rank else "full" if shape.trainable == "all" else "part"
    more = ", checkpointing" if alignment.gradient_checkpointing else ""
    return f"{kind}, {shape.pairs} pairs a pass, {shape.computed_in}{more}"


def _parts(footprint: Footprint) -> str:
    return ", ".join(f"{name} {size / GIB:.2g}" for name, size in footprint.parts)
