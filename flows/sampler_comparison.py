"""A fast sampler against the exact one: the same prompts and seeds, measured by both classifiers."""

from typing import Literal

from prefect import flow
from prefect.artifacts import MarkdownArtifact

from flows.expansion import expansion
from flows.holding import holding
from flows.measuring import draw_and_classify
from flows.placement import resolved
from popalign_core.errors import InvalidInput
from popalign_core.execution import AUTO, Execution
from popalign_core.presets import PresetName, chosen_config
from tasks.inputs import check_inputs
from tasks.publishing import artifact_key
from tasks.run import BASE, run_tags
from tasks.run_page import show
from tasks.sampler_comparison import HEADINGS, SamplerSummary, both_configs, compare_samplers, summarize_samplers

PURPOSE = "evaluation"
ROLES: tuple[Literal["judge", "builder"], ...] = ("judge", "builder")


@flow(name="sampler_comparison", flow_run_name="sampler comparison {run_id}")
def sampler_comparison(
    run_id: str = "samplers",
    preset_name: PresetName = "emoji",
    settings: list[str] = ["sampling.approximate.steps=5"],  # noqa: B006 - Prefect shows it, and nobody changes it
    exact_run_id: str = "",
    margin: float = 0.05,
    workspace: str = "",
    execution: Execution = AUTO,
) -> SamplerSummary:
    """Draws the base model's held-out images by both samplers, and says whether the fast one moves the population.

    Starting it again with the same run id goes on from the last committed shard.

    Args:
        run_id: The fast sampler's run is <run id>-fast, the exact one's <run id>-exact.
        preset_name: Configuration to start from.
        settings: Changes to the preset, each as stage.field=value; at least one of sampling.approximate.
        exact_run_id: A run with the same configuration but for sampling.approximate; its images are used.
        margin: Largest change of a share that counts as none, 0 to 1; the disparity is measured against it as well.
        workspace: Folder of the workspace; empty = the worker's own.
        execution: Where the work is done.
    """
    fast_id, exact_id = f"{run_id}-fast", exact_run_id or f"{run_id}-exact"
    if fast_id == exact_id:
        raise InvalidInput(f"{fast_id} cannot be compared with itself: choose another run id.")
    chosen = chosen_config(preset_name, settings, None)
    exact, fast = both_configs(chosen)
    check_inputs(fast)
    place = resolved(execution)
    with holding(workspace, exact_id), holding(workspace, fast_id), run_tags(preset_name, fast):
        for name, config in ((exact_id, exact), (fast_id, fast)):
            expansion(name, preset_name, workspace, config)
            for role in ROLES:
                draw_and_classify(name, BASE, PURPOSE, role, workspace, config, place)
        compare_samplers(workspace, exact_id, fast_id, exact, fast)
        summary = summarize_samplers(workspace, exact_id, fast_id, fast, margin)
    show(
        MarkdownArtifact(
            key=artifact_key(run_id, "samplers"),
            markdown=_markdown(summary),
            description=f"{run_id}: {summary.movement}",
        )
    )
    return summary


def _markdown(summary: SamplerSummary) -> str:
    lines = [
        f"## {summary.movement}: {summary.reason}",
        "",
        f"Fast: {'; '.join(summary.approximations)}. {summary.speed_source}. Pairs of images: `{summary.sheet}`",
    ]
    if summary.differences:
        lines += ["", f"**Also drawn differently**, which may move people as well: {summary.differences}"]
    for role, rows in summary.lines.items():
        lines += ["", f"{role} {summary.classifiers[role]}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (HEADINGS, ("---",) * len(HEADINGS), *rows)]
    return "\n".join(lines)
