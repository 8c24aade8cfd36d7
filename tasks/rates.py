"""What work took in earlier runs of a workspace: seconds a unit, from `timings`; else what is stated."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from popalign_core.config import RunConfig, SamplingConfig
from popalign_core.stated_costs import (
    Cost,
    classification_cost,
    measurement_cost,
    native_side,
    place_of,
    sampling_cost,
    training_cost,
)
from popalign_core.workload import drawn_places, passes_per_image
from storage.layout import Workspace
from storage.tables import read_rows

# A tenth of the pieces was quicker than `low`, a tenth slower than `high`.
TAIL = 0.1
Values = Mapping[str, Any]
# Other weights of the same architecture, or a LoRA added to them, change no time.
SAMPLER = ("model", "sampling.image_size", "sampling.dtype")
DETECTION = ("detection.persons", "detection.faces")
MEASURED_ALIKE = (
    "model",
    "sampling.image_size",
    *DETECTION,
    "classification.builder",
    "classification.agreement",  # the vectors are then there before the assessment
    "assessment.resamples",
)
DRAWN = (*SAMPLER, "sampling.approximate.cache_every", "sampling.approximate.fp8_weights")
TRAINER = (
    *SAMPLER,
    "alignment.objective",
    "alignment.lora_rank",
    "alignment.trainable",
    "alignment.gradient_checkpointing",
)
POPULATIONS = (
    "model",
    "model_lora",
    "model_unet",
    "expansion.prompts",
    "expansion.axes",
    "expansion.max_subjects",
    "images.train_neutral",
    "populations.winners",
)


@dataclass(frozen=True)
class Rate:
    """Seconds a unit of work. low, high: the same where a piece alone was measured, or none. pieces: 0 = stated."""

    seconds: float
    low: float
    high: float
    source: str
    pieces: int = 0
    run_id: str = ""

    def times(self, factor: float, source: str) -> "Rate":
        """Another unit of work of the same kind."""
        numbers = (self.seconds * factor, self.low * factor, self.high * factor)
        return Rate(*numbers, source, self.pieces, self.run_id)


@dataclass(frozen=True)
class Piece:
    """A committed piece of work. key: `<table>/<key>` of its artifact. items: images or steps."""

    stage: str
    key: str
    seconds: float
    items: int
    device: str


@dataclass(frozen=True)
class Record:
    """An earlier run. config: dotted key -> value, with today's defaults for what it did not know."""

    place: Workspace
    run_id: str
    started_at: str
    config: Values

    def agrees(self, wanted: Values, names: Sequence[str]) -> bool:
        """Whether both have the same values there."""
        return all(self.config.get(name) == wanted.get(name) for name in names)

    @property
    def passes(self) -> int:
        """Calls of the UNet for one of its images."""
        names = [name for name in self.config if name.startswith("sampling.approximate.")]
        approximate = {name.rpartition(".")[2]: self.config[name] for name in names}
        values = {name: self.config[f"sampling.{name}"] for name in ("steps", "guidance_scale")}
        sampling = SamplingConfig.model_validate({**values, "approximate": approximate})
        return passes_per_image(sampling.drawn_steps, sampling.drawn_guidance)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces that did something."""
        columns = ["stage", "key", "seconds", "items", "device"]
        rows = read_rows(self.place, self.run_id, "timings", columns=columns)
        return tuple(Piece(**row) for row in rows if row["items"] > 0)


def read_records(place: Workspace) -> list[Record]:
    """Runs that were started in a workspace, the last one first."""
    defaults = flat_config(RunConfig().model_dump(mode="json"))
    found: list[Record] = []
    for run_id in place.run_ids():
        rows = read_rows(place, run_id, "runs", columns=["config_json"])
        starts = read_rows(place, run_id, "starts", columns=["started_at"])
        if rows and starts:
            config = {**defaults, **flat_config(json.loads(rows[0]["config_json"]))}
            found.append(Record(place, run_id, max(row["started_at"] for row in starts), config))
    return sorted(found, key=lambda record: (record.started_at, record.run_id), reverse=True)


def flat_config(values: Values) -> dict[str, Any]:
    """Dotted keys, as `--set` takes them."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            stage = flat_config(cast("dict[str, Any]", value))
            flat |= {f"{name}.{field}": inner for field, inner in stage.items()}
        else:
            flat[name] = value
    return flat


def sampling_rate(records: Sequence[Record], config: RunConfig) -> Rate:
    """Seconds for a place in a batch: a padded batch costs as much as a full one.

    From the last run with the same steps, guidance on or off, image size, number format and model; else from one that
    differs in steps or guidance alone, scaled by the calls of the UNet.
    """
    wanted, sampling = flat_config(config.model_dump(mode="json")), config.sampling
    passes = passes_per_image(sampling.drawn_steps, sampling.drawn_guidance)
    same = [record for record in records if record.agrees(wanted, DRAWN)]
    for scaled in (False, True):
        for record in same:
            theirs = record.passes
            if scaled or theirs == passes:
                batch = record.config["sampling.batch_size"]
                rate = _measured(record, config.device, "sampling", lambda p, n=batch: drawn_places(p.items, n))
                if rate is not None:
                    return _described(rate, passes / theirs, "images/s", f"{theirs} UNet calls an image", scaled)
    side = sampling.image_size or native_side(config.model)
    place = place_of(config.model, config.device)
    return _stated(sampling_cost(config.model, place, side, sampling.dtype, passes), "images/s")


def classification_rate(records: Sequence[Record], config: RunConfig, role: str) -> Rate:
    """Seconds an image of one classifier, from the last run with it and images of the same model and size.

    The builder's work is to embed images: labels follow from the vectors at once.
    """
    wanted = flat_config(config.model_dump(mode="json"))
    alike = ("model", "sampling.image_size", *DETECTION, f"classification.{role}", "classification.dtype")
    for record in records:
        if record.agrees(wanted, alike):
            rate = _measured(record, config.device, "embedding", lambda p: p.items) if role == "builder" else None
            # Of the judge; and of runs before embedding was timed by itself.
            rate = rate or _measured(record, config.device, "classification", lambda p: p.items, suffix=f".{role}")
            if rate is not None:
                return _described(rate, 1.0, "images/s")
    return _stated(classification_cost(config.model, place_of(config.model, config.device)), "images/s")


def training_rate(records: Sequence[Record], config: RunConfig) -> Rate:
    """Seconds a pair in a step, from the last run with the same model and kind of training; scaled by pairs a step."""
    wanted, alignment = flat_config(config.model_dump(mode="json")), config.alignment
    for record in records:
        preserves = bool(record.config["alignment.preserve_weight"]) == bool(alignment.preserve_weight)
        if preserves and record.agrees(wanted, TRAINER):
            theirs = record.config["alignment.pairs_per_step"]
            rate = _measured(record, config.device, "alignment", lambda p, n=theirs: p.items * n)
            if rate is not None:
                scaled = theirs != alignment.pairs_per_step
                return _described(rate, 1.0, "pairs/s", f"{theirs} pairs a step", scaled)
    side = config.sampling.image_size or native_side(config.model)
    place = place_of(config.model, config.device)
    return _stated(training_cost(config.model, place, side, config.sampling.dtype, alignment), "pairs/s")


def measurement_rate(records: Sequence[Record], config: RunConfig) -> Rate:
    """Seconds an assessed image for features, intervals and decision."""
    wanted = flat_config(config.model_dump(mode="json"))
    for record in records:
        if record.agrees(wanted, MEASURED_ALIKE):
            rate = _measured(record, config.device, "assessment", lambda p: p.items)
            if rate is not None:
                return _described(rate, 1.0, "images/s")
    return _stated(measurement_cost(config.model, place_of(config.model, config.device)), "images/s")


def counterfactuals_drawn(records: Sequence[Record], config: RunConfig) -> tuple[dict[int, int], str]:
    """Counterfactual images by round of the last run over the same prompts, and its id; none gives ({}, "")."""
    wanted = flat_config(config.model_dump(mode="json"))
    for record in records:
        if record.agrees(wanted, POPULATIONS):
            rows = read_rows(record.place, record.run_id, "counterfactuals", columns=["round"])
            if rows:
                return dict(Counter(row["round"] for row in rows)), record.run_id
    return {}, ""


def _measured(record: Record, device: str, stage: str, units: Callable[[Piece], int], suffix: str = "") -> Rate | None:
    """Of a run's pieces on that kind of device. device auto: on whichever the run had."""
    kind = device.partition(":")[0]
    pieces = [piece for piece in record.pieces if piece.stage == stage and piece.key.endswith(suffix)]
    # A classifier's device is recorded as it was asked for.
    pieces = [piece for piece in pieces if kind == "auto" or piece.device.partition(":")[0] in (kind, "auto")]
    if not pieces:
        return None
    counts = np.array([units(piece) for piece in pieces], dtype=float)
    seconds = np.array([piece.seconds for piece in pieces])
    low, high = np.quantile(seconds / counts, [TAIL, 1 - TAIL])
    mean = float(seconds.sum() / counts.sum())
    # The mean weighs pieces by their size, and may lie outside of where most of the small ones do.
    low, high = min(mean, float(low)), max(mean, float(high))
    devices = "/".join(sorted({piece.device for piece in pieces}))
    return Rate(mean, low, high, f"run {record.run_id}, {devices}", len(pieces), record.run_id)


def _described(rate: Rate, factor: float, unit: str, measured_at: str = "", scaled: bool = False) -> Rate:
    many = f"{rate.pieces} piece{'s' if rate.pieces > 1 else ''}"
    speed = _speed(rate.seconds * factor, unit)
    kind = f"scaled from {measured_at}" if scaled else "measured"
    return rate.times(factor, f"{kind}: {speed}, {rate.source}, {many}")


def scoring_rate(records: Sequence[Record], config: RunConfig, kind: str) -> Rate:
    """Seconds an image of one scorer of `quality.scorers`, from the last run with that kind and images of that size."""
    wanted = flat_config(config.model_dump(mode="json"))
    for record in records:
        if record.agrees(wanted, ("model", "sampling.image_size")):
            rate = _measured(record, config.device, "scoring", lambda p: p.items, suffix=f".{kind}")
            if rate is not None:
                return _described(rate, 1.0, "images/s")
    return _stated(classification_cost(config.model, place_of(config.model, config.device)), "images/s")


def _stated(cost: Cost, unit: str) -> Rate:
    rate = Rate(cost.seconds, cost.seconds, cost.seconds, cost.source)
    kind, _, rest = cost.source.partition(":")
    return replace(rate, source=f"{kind}: {_speed(cost.seconds, unit)},{rest}")


def _speed(seconds: float, unit: str) -> str:
    speed = 1 / seconds
    return f"{speed:,.0f} {unit}" if speed >= 100 else f"{speed:.3g} {unit}"
