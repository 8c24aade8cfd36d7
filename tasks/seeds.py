"""The kept model beside those that were trained like it with other seeds."""

from dataclasses import asdict

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.disparity_rows import DisparityRow, measure_disparities
from popalign_core.assessment.seed_spread import Labels, sampling_variance, seed_spread
from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.population_counts import by_prompt, group_counts
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import write_rows
from tasks.assessment import JUDGE_ROLE, classifier_name
from tasks.labels import labelled_samples
from tasks.run import BASE, reference
from tasks.training_order import trained_model

PURPOSE = "evaluation"


def round_of(model_id: str) -> int:
    """The round of a model that was kept."""
    return int(model_id.removeprefix("round-"))


@task(cache_policy=NO_CACHE)
def record_seeds(workspace: str, run_id: str, config: RunConfig, kept: str) -> ArtifactRef:
    """Commits `seeds` and `seed_summaries`, of the judge's labels of held-out images."""
    ref = reference(workspace, run_id, "seeds", kept)
    if is_committed(ref):
        return ref
    models = [trained_model(round_of(kept), index) for index in range(config.alignment.seeds)]
    labels = {model_id: _labels(workspace, run_id, config, model_id) for model_id in (BASE, *models)}
    before = _mean_discrepancies(config, labels[BASE])
    found = [_mean_discrepancies(config, labels[model_id]) for model_id in models]
    judged = {"run_id": run_id, "judge_id": classifier_name(JUDGE_ROLE, config)}
    rows: list[dict[str, object]] = []
    summaries: list[dict[str, object]] = []
    for axis in config.expansion.axes:
        for index, (model_id, values) in enumerate(zip(models, found, strict=True)):
            own = {"value": values[axis].value, "n": values[axis].n, "unknown": values[axis].unknown}
            rows.append({**judged, "model_id": model_id, "seed_index": index, "axis": axis, **own})
        rng = np.random.default_rng(derive_seed(config.seed, "seeds", axis))
        noise = sampling_variance([labels[model_id][axis] for model_id in models], AXES[axis], rng)
        spread = seed_spread([values[axis].value for values in found], noise)
        summaries.append({**judged, "axis": axis, "before": before[axis].value, **asdict(spread)})
    with staged_artifact(ref) as folder:
        write_rows(folder, "seeds", rows)
        write_rows(folder, "seed_summaries", summaries)
    return ref


def _labels(workspace: str, run_id: str, config: RunConfig, model_id: str) -> dict[str, Labels]:
    """By axis and prompt, in the order of the images."""
    samples = labelled_samples(workspace, run_id, config, model_id, PURPOSE, JUDGE_ROLE)
    return {
        name: {prompt: [sample.cell[position] for sample in own] for prompt, own in by_prompt(samples).items()}
        for position, name in enumerate(config.expansion.axes)
    }


def _mean_discrepancies(config: RunConfig, labels: dict[str, Labels]) -> dict[str, DisparityRow]:
    """By axis: the mean L2 over held-out prompts, as the table `disparities` has it."""
    found: dict[str, DisparityRow] = {}
    for name in config.expansion.axes:
        axis = AXES[name]
        counts = {prompt_id: group_counts(own, axis) for prompt_id, own in labels[name].items()}
        rows = measure_disparities(
            counts, axis, axis.uniform(), seed=config.seed, resamples=config.assessment.resamples
        )
        found[name] = next(row for row in rows if (row.level, row.measure) == ("mean", "l2"))
    return found
