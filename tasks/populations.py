"""Preferred and dispreferred populations of one round."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES, Axis, cross_axes
from popalign_core.config import RunConfig
from popalign_core.expansion import Prompt
from popalign_core.populations import LabelledSample, PopulationPair, Refusal, build_populations
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import write_rows
from tasks.labels import labelled_samples
from tasks.run import read_prompts, reference


@task(cache_policy=NO_CACHE)
def build_preferences(workspace: str, run_id: str, config: RunConfig, model_id: str, round_index: int) -> ArtifactRef:
    """Commits `populations`, `preferences` and `refusals` of a round, from the current model's images."""
    ref = reference(workspace, run_id, "populations", f"round-{round_index}")
    if is_committed(ref):
        return ref
    axes = [AXES[name] for name in config.expansion.axes]
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(workspace, run_id) if prompt.split == "train"}
    samples = labelled_samples(workspace, run_id, config, model_id, f"round-{round_index}", "builder")
    populations: list[dict[str, object]] = []
    preferences: list[dict[str, object]] = []
    refusals: list[dict[str, object]] = []
    for prompt in (prompt for prompt in prompts.values() if prompt.kind == "neutral"):
        own = [sample for sample in samples if sample.prompt_id == prompt.prompt_id]
        outcome = build_populations(
            prompt,
            own,
            _specific(prompt, prompts, samples, axes),
            axes,
            size=config.populations.size,
            seed=derive_seed(config.seed, "populations", round_index),
            round_index=round_index,
            weighting=config.populations.weighting,
        )
        common: dict[str, object] = {"run_id": run_id, "round": round_index, "prompt_id": prompt.prompt_id}
        if isinstance(outcome, Refusal):
            refusals.append({**common, "reason": str(outcome.reason), "detail": outcome.detail})
            continue
        populations += [{**common, **row} for row in _population_rows(outcome, axes)]
        for number, pair in enumerate(outcome.pairs):
            preferences.append(
                {
                    **common,
                    "pair_id": f"{round_index}/{prompt.prompt_id}/{number}",
                    "caption": prompt.text,
                    "winner_sample_id": pair.winner_sample_id,
                    "loser_sample_id": pair.loser_sample_id,
                    "weight": pair.weight,
                }
            )
    with staged_artifact(ref) as folder:
        write_rows(folder, "populations", populations)
        write_rows(folder, "preferences", preferences)
        write_rows(folder, "refusals", refusals)
    return ref


def _specific(
    prompt: Prompt, prompts: dict[str, Prompt], samples: list[LabelledSample], axes: list[Axis]
) -> dict[tuple[str, ...], list[LabelledSample]]:
    """The prompt's identity-specific images by requested cell."""
    requested = {
        other.prompt_id: tuple(other.requested[axis.name] for axis in axes)
        for other in prompts.values()
        if other.parent_id == prompt.prompt_id
    }
    cells: dict[tuple[str, ...], list[LabelledSample]] = {cell: [] for cell in requested.values()}
    for sample in samples:
        if sample.prompt_id in requested:
            cells[requested[sample.prompt_id]].append(sample)
    return cells


def _population_rows(pair: PopulationPair, axes: list[Axis]) -> list[dict[str, object]]:
    """A row for every axis (the crossed one too) and group, zeros included."""
    measured = [*axes, cross_axes(axes)] if len(axes) > 1 else axes
    rows: list[dict[str, object]] = []
    for side, population in (("preferred", pair.preferred), ("dispreferred", pair.dispreferred)):
        for axis in measured:
            for group, count in zip(axis.groups, population.counts[axis.name], strict=True):
                rows.append(
                    {
                        "population_id": population.population_id,
                        "side": side,
                        "axis": axis.name,
                        "group": group,
                        "count": count,
                        "size": population.size,
                        "unknown": population.unknown[axis.name],
                    }
                )
    return rows
