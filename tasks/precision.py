"""Draws more held-out images where the interval of what changed is wider than asked for."""

from collections.abc import Mapping

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.precision import images_after, judge_precision
from popalign_core.assessment.uncertainty import compare
from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.population_counts import by_prompt, group_counts
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.labels import labelled_samples
from tasks.run import BASE, reference
from tasks.sampling import EVALUATION, extended

STOP = "stop"


@task(cache_policy=NO_CACHE)
def extend_evaluation(workspace: str, run_id: str, config: RunConfig, model_id: str) -> bool:
    """Commits `extensions`: how wide the intervals are, and whether twice the images are drawn; true if they are.

    The images there are have to be classified by the judge. Once it has said no it says no again.
    """
    stop = reference(workspace, run_id, "extensions", STOP)
    if not config.assessment.precision or is_committed(stop):
        return False
    done = extended(workspace, run_id, config)
    images = images_after(config.images.evaluation, len(done))
    earlier = _half_widths(reference(workspace, run_id, "extensions", done[-1])) if done else {}
    found = judge_precision(
        {
            name: _half_width(workspace, run_id, config, model_id, position)
            for position, name in enumerate(config.expansion.axes)
        },
        earlier,
        wanted=config.assessment.precision,
        images=images,
        most=config.assessment.max_images,
    )
    # An axis that is limited by its prompts does not hold the others up.
    goes_on = any(precision.reason == "too wide" for precision in found.values())
    following = f"{EVALUATION}-{len(done) + 2}" if goes_on else ""
    rows = [
        {
            "run_id": run_id,
            "model_id": model_id,
            "axis": axis,
            "images": images,
            "half_width": precision.half_width,
            "wanted": config.assessment.precision,
            "reason": precision.reason,
            "drawn_next": following or None,
        }
        for axis, precision in found.items()
    ]
    with staged_artifact(reference(workspace, run_id, "extensions", following or STOP)) as folder:
        write_rows(folder, "extensions", rows)
    return goes_on


def _half_widths(ref: ArtifactRef) -> Mapping[str, float]:
    return {row["axis"]: row["half_width"] for row in read_artifact(ref, "extensions")}


def _half_width(workspace: str, run_id: str, config: RunConfig, model_id: str, position: int) -> float:
    """Of the interval that the assessment would give to the change of an axis's mean L2."""
    axis = AXES[config.expansion.axes[position]]
    sides: list[np.ndarray] = []
    for model in (BASE, model_id):
        samples = labelled_samples(workspace, run_id, config, model, EVALUATION, "judge")
        prompts = sorted(by_prompt(samples).items())
        sides.append(np.stack([group_counts([s.cell[position] for s in own], axis)[0] for _, own in prompts]))
    rng = np.random.default_rng(derive_seed(config.seed, "assessment", "l2", "eval", axis.name))
    change = compare(sides[0], sides[1], axis.uniform(), l2_discrepancy, rng=rng, resamples=config.assessment.resamples)
    return (change.difference.high - change.difference.low) / 2
