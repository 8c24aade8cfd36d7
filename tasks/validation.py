"""Held-out disparity during training, and the choice of the model that is kept."""

from functools import lru_cache

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.alignment.stopping import HeldOutPoint, StopRule, StopVerdict
from popalign_core.assessment.disparity import l2_discrepancy, sampling_floor
from popalign_core.assessment.quality import clip_score
from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.population_counts import by_prompt, group_counts
from storage.artifacts import is_committed
from storage.checkpoints import remove_checkpoints
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.alignment import WHOLE_TRAINING
from tasks.labels import labelled_samples
from tasks.run import builder, read_prompts, reference
from tasks.sampling import plan_shards
from tasks.stored_shard import StoredShard

PURPOSE = "validation"


def stop_rule(config: RunConfig) -> StopRule:
    """Stops once no round has brought a better model for two rounds, or everything is at its sampling floor."""
    floors = {name: float(sampling_floor(config.images.validation, len(AXES[name].groups))) for name in _axes(config)}
    return StopRule(patience=2, floors=floors, max_quality_drop=config.alignment.max_quality_drop)


def _axes(config: RunConfig) -> tuple[str, ...]:
    return config.expansion.axes


def held_out_point(workspace: str, run_id: str, config: RunConfig, model_id: str, step: int) -> HeldOutPoint:
    """Mean over validation prompts of the L2 discrepancy, per axis, as the builder's classifier sees it."""
    samples = labelled_samples(workspace, run_id, config, model_id, PURPOSE, "builder")
    populations = by_prompt(samples).values()
    disparities: dict[str, float] = {}
    for position, name in enumerate(_axes(config)):
        axis = AXES[name]
        counts = [group_counts([sample.cell[position] for sample in own], axis)[0] for own in populations]
        disparities[name] = float(np.nanmean(l2_discrepancy(np.stack(counts), axis.uniform())))
    quality = None
    if config.alignment.max_quality_drop is not None:
        quality = held_out_quality(workspace, run_id, config, model_id)  # pyright: ignore[reportArgumentType] - hashable
    return HeldOutPoint(step=step, disparities=disparities, quality=quality)


# The images of a model do not change once they are committed, and every round asks again for those of all before it.
@lru_cache(maxsize=32)
def held_out_quality(workspace: str, run_id: str, config: RunConfig, model_id: str) -> float:
    """Mean CLIP score of the validation images under their prompts, by the builder's model."""
    seen = builder(config.classification, config.device)
    texts = {prompt.prompt_id: prompt.text for prompt in read_prompts(workspace, run_id)}
    vectors = {prompt_id: seen.text_features([text]).numpy()[0] for prompt_id, text in texts.items()}
    scores: list[np.ndarray] = []
    for shard in plan_shards(workspace, run_id, config, model_id, PURPOSE):
        stored = StoredShard(shard, config)
        prompts = np.stack([vectors[str(row["prompt_id"])] for row in stored.rows])
        scores.append(clip_score(stored.embeddings.of_whole_images, prompts))
    return float(np.concatenate(scores).mean())


@task(cache_policy=NO_CACHE)
def validation_verdict(workspace: str, run_id: str, config: RunConfig, model_ids: list[str]) -> StopVerdict:
    """What the rule says of the models so far, the base first."""
    history = [held_out_point(workspace, run_id, config, model, step) for step, model in enumerate(model_ids)]
    return stop_rule(config).judge(history)


@task(cache_policy=NO_CACHE)
def record_validations(workspace: str, run_id: str, config: RunConfig, model_ids: list[str]) -> str:
    """Commits `validations`; returns the trained model that is kept, the most even one of those with sound quality.

    Where no round beat the base the best of them is assessed all the same, and the decision holds it.
    """
    rule = stop_rule(config)
    points = {
        model_id: held_out_point(workspace, run_id, config, model_id, round_index)
        for round_index, model_id in enumerate(model_ids)
    }
    before = points[model_ids[0]]

    def preference(model_id: str) -> tuple[bool, float]:
        point = points[model_id]
        return not rule.is_sound(before, point), rule.score(before.disparities, point.disparities)

    kept = min(model_ids[1:], key=preference)
    rows: list[dict[str, object]] = []
    for round_index, (model_id, point) in enumerate(points.items()):
        for axis, disparity in point.disparities.items():
            row: dict[str, object] = {"run_id": run_id, "model_id": model_id, "round": round_index, "axis": axis}
            row["quality"] = point.quality
            rows.append({**row, "disparity": disparity, "floor": rule.floors[axis], "selected": model_id == kept})
    ref = reference(workspace, run_id, "validations", "all")
    if not is_committed(ref):
        with staged_artifact(ref) as folder:
            write_rows(folder, "validations", rows)
    remove_checkpoints(Workspace.open(workspace), run_id, WHOLE_TRAINING)  # of a training without rounds
    return kept
