"""Whether the held-out images of a configuration would show a given fall of the disparity, and how many would."""

from collections.abc import Sequence

import numpy as np

from popalign_core.assessment.power import MOST_IMAGES, POWER, SIMULATIONS, Detection, detection
from popalign_core.attributes import AXES, Axis, axis_words
from popalign_core.config import RunConfig
from popalign_core.workload import BASE, workload
from storage.tables import read_rows
from tasks.plan import existing_workspace
from tasks.rates import Record, flat_config, read_records

HEADINGS = ("perceived", "prompts", "disparity of the base", "images a prompt", "shown in", f"needed for {POWER:.0%}")
SPLIT = "eval"
# What decides a base model's shares: who draws what, and who judges it.
SHARES = (
    *("model", "model_lora", "model_unet", "expansion.prompts", "expansion.axes", "expansion.max_subjects"),
    *("sampling.scheduler", "sampling.steps", "sampling.guidance_scale", "sampling.image_size"),
    *("classification.judge", "classification.min_confidence", "detection.persons", "detection.faces"),
)
# Without a run to learn from: every prompt shows one group in four images of five.
STATED_SHARE = 0.8


def planned_detection(config: RunConfig, workspace: str, change: float) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of HEADINGS, one an axis, and notes: where the base model's shares come from, and what is assumed.

    change: fall of the mean L2 over held-out prompts. Raises: InvalidInput where the base model's disparity is less.
    """
    records, wanted = read_records(existing_workspace(workspace)), flat_config(config.model_dump(mode="json"))
    prompts = workload(config).neutral[SPLIT]
    rows: list[tuple[str, ...]] = []
    sources: list[str] = []
    for name in config.expansion.axes:
        axis = AXES[name]
        shares, source = _base_shares(records, wanted, axis, prompts)
        found = detection(shares, axis.uniform(), change, config.images.evaluation, seed=config.seed)
        rows.append(_row(name, found))
        sources.append(f"Shares of {name.replace('_', ' ')}: {source}.")
    assumed = (
        "Taken for granted: every prompt moves the same part of its way to the even target, and nobody is unknown. "
        f"From {SIMULATIONS} simulated assessments each, so a share is known to about 3%."
    )
    return rows, [*dict.fromkeys(sources), assumed]


def _row(axis: str, found: Detection) -> tuple[str, ...]:
    needed = f"more prompts (over {MOST_IMAGES:,} images)" if found.needed is None else f"{found.needed:,} images"
    verdict = "" if found.power >= POWER else ", too few"
    return (
        axis_words(axis),
        f"{found.prompts}",
        f"{found.disparity:.3f}",
        f"{found.images}",
        f"{found.power:.0%}{verdict}",
        needed,
    )


def _base_shares(
    records: Sequence[Record], wanted: dict[str, object], axis: Axis, prompts: int
) -> tuple[np.ndarray, str]:
    """(prompts, groups) of held-out prompts: from the last run of that model over them, judged alike, else as stated.

    Half an image is added to each group: what was not seen among a few images may still be there.
    """
    for record in records:
        if record.agrees(wanted, SHARES):
            where = {"model_id": BASE, "split": SPLIT, "axis": axis.name}
            columns = ["prompt_id", "group", "count"]
            rows = read_rows(record.place, record.run_id, "group_shares", equal=where, columns=columns)
            own = {(row["prompt_id"], row["group"]): row["count"] for row in rows if row["prompt_id"] is not None}
            names = sorted({prompt for prompt, _ in own})
            if names:
                counts = np.array([[own[prompt, group] + 0.5 for group in axis.groups] for prompt in names])
                return counts / counts.sum(axis=1, keepdims=True), f"as run {record.run_id} measured them"
    groups = len(axis.groups)
    shares = np.full((prompts, groups), (1 - STATED_SHARE) / (groups - 1))
    shares[np.arange(prompts), np.arange(prompts) % groups] = STATED_SHARE
    return shares, f"stated default: one group in {STATED_SHARE:.0%} of each prompt's images"
