"""What sampling and training take of a device's memory, counted on meta tensors; and the refusal of what cannot fit."""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import psutil
import torch

from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.execution import Execution
from popalign_core.models.architecture import ArchitectureUnknown, architecture_of
from popalign_core.models.checkpoints import EMBEDDED
from popalign_core.models.footprint import Footprint, SamplingShape, sampling_footprint
from popalign_core.models.image_latents import encode_batch
from popalign_core.models.sdxl import pick_device
from popalign_core.models.training_footprint import DrawnGroups, TrainingShape, training_footprint
from popalign_core.stated_costs import native_side
from popalign_core.workload import passes_per_image
from tasks.run import loaded_model, sampling_settings
from tasks.samplers import logger

Stage = Literal["sampling", "training"]
STAGES: tuple[Stage, ...] = ("sampling", "training")
GIB = 2**30
PLANNED_PROCESSES = 8
WAY_OUT = {
    "sampling": "choose sampling.dtype=bfloat16, or a smaller sampling.batch_size or sampling.image_size",
    "training": (
        "choose alignment.micro_batch=1, alignment.gradient_checkpointing=true, alignment.lora_rank=16, "
        "sampling.dtype=bfloat16 with it, or alignment.sharded=true in several processes"
    ),
    "reward": (
        "choose alignment.micro_batch=1, alignment.gradient_checkpointing=true, alignment.lora_rank=16, "
        "sampling.dtype=bfloat16 with it, or another alignment.objective"
    ),
}


class NotEnoughMemory(InvalidInput):
    """A stage needs more memory than its device has free."""


@dataclass(frozen=True)
class Room:
    """bytes: free for this process, with what it has taken already. where: for a message."""

    bytes: float
    where: str

    @property
    def on_cpu(self) -> bool:
        """Whether what is moved away from a GPU stays in it."""
        return "cuda" not in self.where


@dataclass(frozen=True)
class MemoryRow:
    """stage, what of, GiB in all, and the parts: ready to show."""

    stage: str
    setting: str
    needed: str
    parts: str


def stage_footprint(
    config: RunConfig, stage: Stage, *, batch: int = 0, processes: int = 1, on_cpu: bool | None = None
) -> Footprint:
    """Of a stage of a run. batch: of sampling, 0 = the configured one. processes: that share a training step.

    on_cpu: whether that is where it will be; None = as far as the configuration tells. Raises: ArchitectureUnknown.
    """
    model = architecture_of(config.model)
    stay = _is_for_cpu(config) if on_cpu is None else on_cpu
    if stage == "training":
        return training_footprint(model, training_shape(config, processes, on_cpu=stay))
    return sampling_footprint(model, sampling_shape(config, batch, on_cpu=stay))


def sampling_shape(config: RunConfig, batch: int = 0, *, on_cpu: bool = False) -> SamplingShape:
    """What a run's sampling is like. batch: 0 = the configured one."""
    sampling, acceleration = config.sampling, config.acceleration
    count, side = batch or sampling.batch_size, _side(config)
    chosen = sampling_settings(sampling, acceleration).acceleration
    return SamplingShape(
        side=sampling.image_size,
        batch=count,
        decoded=chosen.decoded_at_once(count, "cpu" if on_cpu else "cuda", side, side),
        dtype=sampling.dtype,
        passes=passes_per_image(sampling.drawn_steps, sampling.drawn_guidance),
        guided=sampling.drawn_guidance > 1,
        vae_dtype=acceleration.vae_dtype,
        fp8_weights=sampling.approximate.fp8_weights,
        fused_projections=acceleration.fused_projections,
        math_attention=sampling.attention == "math",
        cuda_graphs=acceleration.cuda_graphs,
        encoders_stay=on_cpu,
    )


def training_shape(config: RunConfig, processes: int = 1, *, on_cpu: bool = False) -> TrainingShape:
    """What a step of a run's training is like in each of its processes."""
    alignment, drawn = config.alignment, _drawn_groups(config)
    share = drawn.images * drawn.trained if drawn else ceil(alignment.pairs_per_step / processes)
    images_each = 3 if alignment.preserve_weight else 2
    return TrainingShape(
        side=config.sampling.image_size,
        pairs=min(share, alignment.micro_batch or share),
        dtype=config.sampling.dtype,
        lora_rank=alignment.lora_rank,
        trainable=alignment.trainable,
        checkpointing=alignment.gradient_checkpointing,
        images_each=(2 if config.sampling.guidance_scale > 1 else 1) if drawn else images_each,
        mixed=alignment.mixed_precision,
        averaged=alignment.ema_decay is not None,
        further=alignment.redraw and alignment.rounds > 1,
        eight_bit=alignment.optimizer == "adamw_8bit",
        shards=processes if alignment.sharded else 1,
        encoded=0 if drawn or config.sampling.keep_latents else encode_batch(_side(config)),
        encoders_stay=on_cpu,
        drawn=drawn,
    )


def _drawn_groups(config: RunConfig) -> DrawnGroups | None:
    """None where training draws nothing itself."""
    if config.alignment.objective != "reward":
        return None
    from popalign_core.models.zero_shot import builder_bytes  # late: open_clip takes seconds

    reward, most = config.reward, config.alignment.micro_batch or config.reward.group_size
    return DrawnGroups(
        groups=reward.groups,
        images=reward.group_size,
        at_once=min(reward.group_size, most),
        steps=config.sampling.steps,
        trained=reward.trained_steps,
        builder_bytes=builder_bytes(config.classification.builder, config.classification.dtype),
    )


def memory_rows(config: RunConfig) -> tuple[list[MemoryRow], list[str]]:
    """What `popalign plan` shows of memory, and notes: where the numbers come from, and what will not fit here."""
    try:
        source = architecture_of(config.model).source
    except ArchitectureUnknown as error:
        return [], [f"{str(error)[0].upper()}{str(error)[1:]}"]
    rows: list[MemoryRow] = []
    notes = [f"Memory by calculation on {source}, without the driver's own (about 1 GiB)."]
    room = _room_for(config)
    for stage in STAGES:
        needed = stage_footprint(config, stage, on_cpu=room.on_cpu if room else None)
        rows.append(MemoryRow(stage, _setting(config, stage), f"{needed.bytes / GIB:.1f} GiB", _parts(needed)))
        if room is not None and needed.bytes > room.bytes:
            fewer = stage == "sampling" and not room.on_cpu and _fits(config, room)
            what = "Training in one process" if stage == "training" and config.alignment.sharded else stage.capitalize()
            then = (
                "The batch will be halved until it does" if fewer else f"It will be refused: {_way_out(config, stage)}"
            )
            notes.append(f"{what} does not fit: {room.bytes / GIB:.1f} GiB are free in {room.where}. {then}.")
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

    On a GPU sampling halves its batch until it fits, so one image must. What cannot be counted is not refused.
    """
    if not execution.memory_check:
        return
    room = room_of(config.device)
    for stage in stages if room is not None else ():
        assert room is not None  # or there are no stages
        batch = 0 if room.on_cpu else 1
        try:
            needed = stage_footprint(config, stage, batch=batch, processes=_processes(execution), on_cpu=room.on_cpu)
        except ArchitectureUnknown as error:
            logger().warning("%s: %s", stage, error)
            return
        if needed.bytes > room.bytes:
            raise NotEnoughMemory(
                f"{stage} of {config.model} needs {needed.bytes / GIB:.1f} GiB ({_parts(needed)}), and "
                f"{room.bytes / GIB:.1f} GiB are free in {room.where}; nothing was loaded. Free some, or "
                f"{_way_out(config, stage)}. To try it all the same: --set execution.memory_check=false."
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


def _is_for_cpu(config: RunConfig) -> bool:
    """Whether a plan's run would be on a CPU: without a GPU here, a large model is taken to be meant for one."""
    if config.device == "auto":
        return config.model in EMBEDDED and not torch.cuda.is_available()
    return config.device == "cpu"


def _room_for(config: RunConfig) -> Room | None:
    """Where a plan's run would be, as far as that is here."""
    if config.device == "auto" and not torch.cuda.is_available() and not _is_for_cpu(config):
        return None
    try:
        return room_of(config.device)
    except InvalidInput:  # a device of another machine
        return None


def _fits(config: RunConfig, room: Room) -> bool:
    return stage_footprint(config, "sampling", batch=1, on_cpu=room.on_cpu).bytes <= room.bytes


def _way_out(config: RunConfig, stage: Stage) -> str:
    return WAY_OUT["reward" if stage == "training" and config.alignment.objective == "reward" else stage]


def _side(config: RunConfig) -> int:
    """Pixels a side of an image."""
    try:
        return config.sampling.image_size or architecture_of(config.model).native_side
    except ArchitectureUnknown:
        return native_side(config.model)


def _processes(execution: Execution) -> int:
    return execution.training_processes * execution.training_hosts


def _setting(config: RunConfig, stage: Stage) -> str:
    if stage == "sampling":
        return f"batch of {config.sampling.batch_size}, {config.sampling.dtype}"
    alignment, shape = config.alignment, training_shape(config)
    kind = f"LoRA {alignment.lora_rank}" if alignment.lora_rank else "full" if shape.trainable == "all" else "part"
    more = ", checkpointing" if alignment.gradient_checkpointing else ""
    what = "steps of images" if shape.drawn else "pairs"
    return f"{kind}, {shape.pairs} {what} a pass, {shape.computed_in}{more}"


def _parts(footprint: Footprint) -> str:
    return ", ".join(f"{name} {size / GIB:.2g}" for name, size in footprint.parts)
