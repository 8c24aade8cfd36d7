"""Two runs of the same prompts and seeds by two samplers, compared image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.approximations import ApproximateConfig
from popalign_core.assessment.paired import DISPARITY, UNKNOWN, PairedRow, compare_axis, joint_counts
from popalign_core.assessment.sampler_verdict import Movement, judge_sampler
from popalign_core.attributes import AXES, CROSSING, Axis, axis_words, cross_axes
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.population_counts import LabelledSample, by_prompt, crossed_label
from popalign_core.reporting.contact_sheet import contact_sheet
from popalign_core.sampler_facts import NOT_RECORDED, Facts, difference_text, sampler_differences
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.images import decode_image
from storage.layout import Workspace
from storage.publication import publish_file
from storage.tables import read_artifact, read_images, read_rows, write_rows
from tasks.assessment import BUILDER_ROLE, JUDGE_ROLE, classifier_name
from tasks.labels import labelled_samples
from tasks.run import BASE, read_prompts, reference, sampling_settings
from tasks.samplers import recorded_samplers
from tasks.sampling import plan_shards

PURPOSE, SPLIT = "evaluation", "eval"
ROLES = (JUDGE_ROLE, BUILDER_ROLE)
HEADINGS = (
    "perceived",
    "exact",
    "fast",
    "difference [95%]",
    "floor",
    "flips [95%]",
    "p",
    "n + unknown",
    "",
)
UNRECORDED = "device not recorded"
SHEET_FILE = "samplers.webp"
SHEET_PROMPTS, SHEET_COLUMNS = 12, 10


@dataclass(frozen=True)
class SamplerSummary:
    """movement, reason: of the judge and the builder together. lines: of HEADINGS, ready to show, by classifier's role.

    differences: in which the two were drawn beside the approximation, in words, else empty.
    speed: how many times quicker an image is drawn, None where the two were not drawn on one device, by its name.
    classifiers: ids by role.
    """

    exact_run_id: str
    fast_run_id: str
    approximations: tuple[str, ...]
    movement: str
    reason: str
    lines: dict[str, tuple[tuple[str, ...], ...]]
    differences: str
    speed: float | None
    speed_source: str
    sheet: str
    classifiers: dict[str, str]


def both_configs(config: RunConfig) -> tuple[RunConfig, RunConfig]:
    """The exact run's configuration and the fast one's. Raises: InvalidInput where nothing is approximate."""
    if config.sampling.approximate.is_exact:
        raise InvalidInput(
            "there is nothing to compare: say what is approximate, for example --set sampling.approximate.steps=5."
        )
    exact = config.model_copy(
        update={"sampling": config.sampling.model_copy(update={"approximate": ApproximateConfig()})}
    )
    # A sampler that draws nobody is a result here, and no reason to stop.
    lenient = config.classification.model_copy(update={"max_unclassified": 1.0})
    return exact, config.model_copy(update={"classification": lenient})


@task(cache_policy=NO_CACHE)
def compare_samplers(
    workspace: str, exact_run_id: str, fast_run_id: str, exact: RunConfig, fast: RunConfig
) -> ArtifactRef:
    """Commits `sampler_comparisons` in the fast run. Raises: InvalidInput where the two are no pairs."""
    ref = reference(workspace, fast_run_id, "sampler_comparisons", exact_run_id)
    if is_committed(ref):
        return ref
    sides = {
        run_id: _drawn(workspace, run_id, config) for run_id, config in ((exact_run_id, exact), (fast_run_id, fast))
    }
    seeds = [{sample: row["seed"] for sample, row in rows.items()} for rows in sides.values()]
    prints = ["+".join(sorted({row["sampler_fingerprint"] for row in rows.values()})) for rows in sides.values()]
    if seeds[0] != seeds[1] or prints[0] == prints[1]:
        raise InvalidInput(
            f"{exact_run_id} and {fast_run_id} are no pairs of one model's images: the same prompts and seeds by two "
            "samplers are compared. Use another --run-id."
        )
    identity = {
        "run_id": fast_run_id,
        "exact_run_id": exact_run_id,
        "model_id": BASE,
        "split": SPLIT,
        "exact_fingerprint": prints[0],
        "fast_fingerprint": prints[1],
    }
    rows: list[dict[str, Any]] = []
    for role in ROLES:
        labels = [
            by_prompt(labelled_samples(workspace, run_id, config, BASE, PURPOSE, role))
            for run_id, config in ((exact_run_id, exact), (fast_run_id, fast))
        ]
        more = {"role": role, "classifier_id": classifier_name(role, fast)}
        rows += [{**identity, **more, **asdict(row)} for row in _compared(labels, fast)]
    with staged_artifact(ref) as folder:
        write_rows(folder, "sampler_comparisons", rows)
    return ref


def _drawn(workspace: str, run_id: str, config: RunConfig) -> dict[str, dict[str, Any]]:
    shards = plan_shards(workspace, run_id, config, BASE, PURPOSE)
    return {row["sample_id"]: row for shard in shards for row in read_artifact(shard, "samples")}


def _compared(labels: Sequence[dict[str, list[LabelledSample]]], config: RunConfig) -> list[PairedRow]:
    axes = [AXES[name] for name in config.expansion.axes]
    found: list[PairedRow] = []
    for position, axis in enumerate([*axes, cross_axes(axes)] if len(axes) > 1 else axes):
        exact, fast = (_groups(side, axes, position) for side in labels)
        rng = np.random.default_rng(derive_seed(config.seed, "samplers", axis.name))
        found += compare_axis(joint_counts(exact, fast, axis), axis, rng=rng, resamples=config.assessment.resamples)
    return found


def _groups(side: dict[str, list[LabelledSample]], axes: Sequence[Axis], position: int) -> dict[str, list[str | None]]:
    """Perceived groups of each prompt's images by index; the position after the axes is the crossed one."""
    return {
        prompt: [
            sample.cell[position] if position < len(axes) else crossed_label(sample.cell)
            for sample in sorted(samples, key=lambda sample: sample.index)
        ]
        for prompt, samples in side.items()
    }


@task(cache_policy=NO_CACHE)
def summarize_samplers(
    workspace: str, exact_run_id: str, fast_run_id: str, config: RunConfig, margin: float
) -> SamplerSummary:
    """Judges the committed rows, measures the speed from both runs' timings, and draws the sheet of pairs."""
    place = Workspace.open(workspace)
    ref = reference(workspace, fast_run_id, "sampler_comparisons", exact_run_id)
    rows = read_artifact(ref, "sampler_comparisons")
    by_role = {role: [row for row in rows if row["role"] == role] for role in ROLES}
    plain = {role: [_paired(row) for row in own] for role, own in by_role.items()}
    verdict = judge_sampler({f"the {role}": own for role, own in plain.items()}, margin)
    lines = {
        role: tuple(
            _line(row, movement)
            for row, movement in zip(own, verdict.movements[f"the {role}"], strict=True)
            # Crossed groups are many; the table has them all.
            if CROSSING not in row.axis or row.measure == DISPARITY or movement is Movement.MOVED
        )
        for role, own in plain.items()
    }
    samplers = {
        run_id: list(recorded_samplers(place, run_id, rows[0][column].split("+")).values())
        for run_id, column in ((exact_run_id, "exact_fingerprint"), (fast_run_id, "fast_fingerprint"))
    }
    speed, source = _speed(place, samplers)
    return SamplerSummary(
        exact_run_id=exact_run_id,
        fast_run_id=fast_run_id,
        approximations=config.sampling.approximations,
        movement=str(verdict.movement),
        reason=verdict.reason,
        lines=lines,
        differences=_differences(samplers, config),
        speed=speed,
        speed_source=source,
        sheet=str(_sheet(place, exact_run_id, fast_run_id)),
        classifiers={role: own[0]["classifier_id"] for role, own in by_role.items()},
    )


def _paired(row: dict[str, Any]) -> PairedRow:
    return PairedRow(**{name: row[name] for name in PairedRow.__dataclass_fields__})


def _line(row: PairedRow, movement: Movement) -> tuple[str, ...]:
    what = row.group or {DISPARITY: "disparity (L2)", UNKNOWN: "unknown"}[row.measure]
    return (
        f"{axis_words(row.axis)}: {what}",
        f"{row.exact:.3f}",
        f"{row.fast:.3f}",
        f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]",
        f"{row.floor:.3f}",
        f"{row.flip_rate:.3f} [{row.flip_low:.3f}, {row.flip_high:.3f}]",
        f"{row.p_value:.2g}",
        f"{row.n} + {row.unknown}" if row.unknown else f"{row.n}",
        str(movement),
    )


def _differences(samplers: Mapping[str, Sequence[Facts]], config: RunConfig) -> str:
    """Facts in which the two runs' samplers differ beside the approximation: "batch_size: 8, 4; device: ..."."""
    known = [facts for own in samplers.values() for facts in own]
    if NOT_RECORDED in known:
        return difference_text({name: (value,) for name, value in NOT_RECORDED.items()})
    exact, fast = (asdict(sampling_settings(side.sampling, side.acceleration)) for side in both_configs(config))
    meant = {name for name in exact if exact[name] != fast[name]}
    if fast["guidance_scale"] == 1:
        meant.add("skip_empty_attention")  # there is none to skip
    return difference_text({name: values for name, values in sampler_differences(known).items() if name not in meant})


def _speed(place: Workspace, samplers: Mapping[str, Sequence[Facts]]) -> tuple[float | None, str]:
    """Seconds an image of the exact run by those of the fast one, models already loaded. samplers: by run."""
    seconds: list[float] = []
    devices: set[str] = set()
    told: list[str] = []
    for run_id, used in samplers.items():
        timings = read_rows(place, run_id, "timings", equal={"stage": "sampling"})
        own = [row for row in timings if row["key"].startswith(f"samples/{BASE}.{PURPOSE}.") and row["items"]]
        images = sum(row["items"] for row in own)
        seconds.append(sum(row["seconds"] for row in own) / max(images, 1))
        names = sorted({facts.get("device", UNRECORDED) for facts in used})
        devices.update(names)
        told.append(f"{seconds[-1]:.3g} s an image ({images} images, {', '.join(names)})")
    comparable = len(devices) == 1 and UNRECORDED not in devices and min(seconds) > 0
    return (seconds[0] / seconds[1] if comparable else None), f"exact {told[0]}, fast {told[1]}"


def _sheet(place: Workspace, exact_run_id: str, fast_run_id: str) -> Path:
    """The same prompts and seeds: for each prompt a row by the exact sampler, and below it one by the fast."""
    prompts = [
        prompt
        for prompt in read_prompts(str(place.root), fast_run_id)
        if (prompt.split, prompt.kind) == (SPLIT, "neutral")
    ]
    names = [[f"{BASE}/{prompt.prompt_id}/{i}" for i in range(SHEET_COLUMNS)] for prompt in prompts[:SHEET_PROMPTS]]
    wanted = [sample for line in names for sample in line]
    images = [read_images(place, run_id, wanted) for run_id in (exact_run_id, fast_run_id)]
    grid = [
        [decode_image(found[sample]) if sample in found else None for sample in line]
        for line in names
        for found in images
    ]
    return publish_file(place, fast_run_id, SHEET_FILE, contact_sheet(grid))
