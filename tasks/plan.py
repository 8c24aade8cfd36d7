"""What a run would do, how long it would take and how much disk, before anything is loaded."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.models.architecture import ArchitectureUnknown
from popalign_core.stated_costs import table_bytes
from popalign_core.workload import ASSESSED, GROUPS, Workload, drawn_places, workload
from storage.layout import MARKER, WORKSPACE_VARIABLE, Workspace
from tasks.memory_plan import Stage, stage_footprint
from tasks.quality import PURPOSES
from tasks.rates import (
    Rate,
    Record,
    classification_rate,
    flat_config,
    measurement_rate,
    read_records,
    sampling_rate,
    scoring_rate,
    training_rate,
)
from tasks.remaining import Left, LeftSet, left_of_run, whole_run
from tasks.sizes import Size, checkpoint_bytes, image_size, latents_size, model_size


@dataclass(frozen=True)
class PlanRow:
    """One kind of work. seconds of one device; low, high: at the quicker and the slower end. bytes: on disk.

    flop: of the networks' products and convolutions, where they are counted.
    """

    stage: str
    work: str
    rate: str = ""
    seconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    bytes: float = 0.0
    flop: float = 0.0

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Ready to show."""
        time = _duration(self.seconds)
        if (self.low, self.high) != (self.seconds, self.seconds):
            time += f" ({_duration(self.low)} to {_duration(self.high)})"
        arithmetic, disk = _flop(self.flop) if self.flop else "", _size(self.bytes) if self.bytes else ""
        return self.stage, self.work, self.rate, arithmetic, time if self.seconds else "", disk


@dataclass(frozen=True)
class RunPlan:
    """rows: by stage. notes: what else is to be known. free_bytes: on the workspace's disk."""

    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]
    free_bytes: int

    @property
    def total(self) -> PlanRow:
        """All rows together."""
        numbers = (sum(getattr(row, name) for row in self.rows) for name in ("seconds", "low", "high", "bytes", "flop"))
        seconds, *more = numbers
        return PlanRow("total", f"{seconds / 3600:.3g} device hours", "", seconds, *more)

    @property
    def warning(self) -> str:
        """Empty where the disk has room."""
        need = self.total.bytes
        if need <= self.free_bytes:
            return ""
        return (
            f"{_size(need)} are needed and {_size(self.free_bytes)} are free: remove old images and weights "
            "(popalign gc), or choose another --workspace."
        )


def planned_work(config: RunConfig, workspace: str = "", run_id: str = "") -> RunPlan:
    """What is to be done for a configuration, at rates that earlier runs in the workspace were measured at.

    workspace: empty = the one that would be opened. run_id: of a run in it, to count only what it has left.
    Raises: InvalidInput if that run was started with another configuration, or a prompt set is not usable;
    RemovedArtifact if it cannot go on.
    """
    place = existing_workspace(workspace)
    records = read_records(place)
    work = workload(config)
    mine = next((record for record in records if record.run_id == run_id), None)
    notes: list[str] = []
    if mine is None:
        left = whole_run(work, records, config)
        notes += [f"there is no run {run_id!r} in {place.root} yet: all of it is counted."] if run_id else []
    else:
        _require_same(mine, config)
        left = left_of_run(mine, work, records, config)
    notes += left.notes
    rows = (*_work_rows(config, work, left, records), *_disk_rows(config, left, records))
    if rows and config.assessment.precision:
        first, most = config.images.evaluation, config.assessment.max_images
        notes.append(f"Counted are {first} held-out images a prompt; assessment.precision may go on to {most}.")
    if rows:
        notes.append("Not counted: starting, loading models, the report. A run may stop after fewer rounds.")
    return RunPlan(rows, tuple(notes), _free_bytes(place.root))


def existing_workspace(workspace: str) -> Workspace:
    """Opens a workspace without making one: a plan leaves nothing behind."""
    chosen = Path(workspace or os.environ.get(WORKSPACE_VARIABLE) or "workspace").absolute()
    return Workspace.open(chosen) if (chosen / MARKER).is_file() else Workspace(chosen)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free


def _require_same(record: Record, config: RunConfig) -> None:
    wanted = flat_config(config.model_dump(mode="json"))
    for name, value in wanted.items():
        if record.config.get(name) != value:
            raise InvalidInput(
                f"run {record.run_id!r} was started with {name} = {record.config.get(name)}, and {value} is planned: "
                "leave out preset and --set to plan what it has left, or choose another --run-id."
            )


def _work_rows(config: RunConfig, work: Workload, left: Left, records: Sequence[Record]) -> Iterator[PlanRow]:
    if left.expansion:
        for split, count in work.neutral.items():
            yield PlanRow("expansion", f"{split}: {count:,} neutral and {work.specific[split]:,} specific prompts")
    rate = sampling_rate(records, config)
    size = image_size(records, config)
    flop = _counted_flop(config, "sampling")
    for group, title in GROUPS.items():
        sets = [part for part in left.sets if part.wanted.group == group]
        for row in _sampling_row(title, sets, rate, size, config.sampling.batch_size):
            yield replace(row, flop=flop * _places(sets, config.sampling.batch_size))
    for role in ("builder", "judge"):
        count = sum(sum(part.classified) for part in left.sets if part.wanted.role == role)
        count += sum(sum(part.seconded) for part in left.sets) if role == "builder" else 0
        if count:
            yield _timed(
                "classification", f"{count:,} images, {role}", classification_rate(records, config, role), count
            )
    if left.trainings:
        steps, pairs = (sum(getattr(part, name) for part in left.trainings) for name in ("steps", "pairs"))
        what = f"{_counted(len(left.trainings), 'round')}, {steps:,} steps of {config.alignment.pairs_per_step} pairs"
        row = _timed("alignment", what, training_rate(records, config), pairs)
        units = steps if config.alignment.objective == "reward" else pairs
        yield replace(row, flop=units * _counted_flop(config, "training"))
    if left.measured:
        count = sum(part.images for part in work.image_sets if part.group in ASSESSED)
        scored = sum(part.images for part in work.image_sets if part.group in PURPOSES)
        for kind in config.quality.sources:
            yield _timed("scoring", f"{scored:,} images, {kind}", scoring_rate(records, config, kind), scored)
        yield _timed("assessment", f"comparison over {count:,} images", measurement_rate(records, config), count)


def _counted_flop(config: RunConfig, stage: Stage) -> float:
    """Of one unit of a stage; 0 where it cannot be counted, which the part on memory says."""
    try:
        return stage_footprint(config, stage).flop
    except ArchitectureUnknown:
        return 0.0


def _sampling_row(title: str, sets: Sequence[LeftSet], rate: Rate, size: Size, batch_size: int) -> Iterator[PlanRow]:
    images, most = sum(sum(part.drawn) for part in sets), sum(part.most for part in sets)
    if not most:
        return
    places = _places(sets, batch_size)
    count = f"{images:,} images" if most == images else f"{images:,} images expected, at most {most:,}"
    upper = "at most " if any(part.wanted.at_most for part in sets) and most == images else ""
    row = _timed("sampling", f"{upper}{count}, {title}", rate, places)
    # Where fewer are expected than there may be, the slower end has all of them.
    more = drawn_places(most - images, batch_size) * rate.high
    yield replace(row, high=row.high + more, bytes=images * size.bytes)


def _places(sets: Sequence[LeftSet], batch_size: int) -> int:
    return sum(drawn_places(shard, batch_size) for part in sets for shard in part.drawn)


def _timed(stage: str, what: str, rate: Rate, units: float) -> PlanRow:
    return PlanRow(stage, what, rate.source, units * rate.seconds, units * rate.low, units * rate.high)


def _disk_rows(config: RunConfig, left: Left, records: Sequence[Record]) -> Iterator[PlanRow]:
    images = sum(sum(part.drawn) for part in left.sets)
    if images:
        # The bytes of images stand beside their sampling; this row says how large one is taken to be.
        yield PlanRow("disk", "images, counted above", image_size(records, config).source)
        if config.sampling.keep_latents:
            latents = latents_size(config)
            yield PlanRow("disk", "latents", latents.source, bytes=images * latents.bytes)
        size = table_bytes(config.model)
        yield PlanRow("disk", "tables", f"stated default: {size:,} B an image", bytes=images * size)
    if left.trainings:
        size = model_size(config)
        yield PlanRow(
            "disk",
            f"weights of {_counted(len(left.trainings), 'model')}",
            size.source,
            bytes=len(left.trainings) * size.bytes,
        )
        if most := checkpoint_bytes(config, size):
            yield PlanRow("disk", "checkpoints, at most, until their training ends", size.source, bytes=most)


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 90 * 60 else f"{seconds / 3600:,.1f} h"


def _flop(count: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e12:.3g} TFLOP"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
