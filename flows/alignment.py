"""Rounds of sampling, populations and fine-tuning, stopped by held-out disparity."""

from prefect import flow, get_run_logger

from flows.holding import holding
from flows.measuring import draw_and_classify
from flows.placement import resolved, run_stage
from flows.populations import populations
from flows.training import training
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.checkpoints import remove_checkpoints
from storage.layout import Workspace
from tasks.counterfactuals import write_counterfactuals
from tasks.populations import has_pairs
from tasks.run import BASE, run_config
from tasks.shards import missing_models
from tasks.validation import record_validations, validation_verdict


@flow(name="alignment", flow_run_name="alignment {run_id}")
def alignment(
    run_id: str,
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
) -> str:
    """Fine-tunes the model in rounds and returns the id of the model that is kept.

    In each round both populations are drawn from the current model, so the gradient vanishes as it arrives at the
    target; without `redraw` a round is a part of one long training on the base model's images. After each round
    disparity is measured on validation prompts; the best model is kept, and training stops when things turn.

    Args:
        run_id: Names the run inside the workspace.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
    """
    settings, execution = run_config(workspace, run_id, config), resolved(execution)
    with holding(workspace, run_id):
        return _rounds(run_id, workspace, settings, execution)


def _rounds(run_id: str, workspace: str, settings: RunConfig, execution: Execution) -> str:
    def measure(model: str, purpose: str) -> None:
        draw_and_classify(run_id, model, purpose, "builder", workspace, settings, execution)

    models = [BASE]
    measure(BASE, "validation")
    verdict = validation_verdict(workspace, run_id, settings, models)
    for round_index in range(1, settings.alignment.rounds + 1):
        if verdict.reason is not None and len(models) > 1:
            get_run_logger().info("stopping after round %d: %s", round_index - 1, verdict.reason)
            break
        parent, drawn = (models[-1], round_index) if settings.alignment.redraw else (BASE, 1)
        if settings.alignment.objective == "reward":  # training draws its own images
            models.append(_train(run_id, workspace, settings, execution, (parent, round_index, drawn)))
            measure(models[-1], "validation")
            verdict = validation_verdict(workspace, run_id, settings, models)
            continue
        measure(parent, f"round-{drawn}")
        if settings.populations.winners == "counterfactual":
            write_counterfactuals(workspace, run_id, settings, parent, drawn)
            measure(parent, f"counterfactual-{drawn}")
        preferences = populations(run_id, parent, drawn, workspace, settings)
        if len(models) > 1 and not has_pairs(preferences):
            get_run_logger().info("stopping after round %d: no prompt has a pair left", round_index - 1)
            break
        models.append(_train(run_id, workspace, settings, execution, (parent, round_index, drawn)))
        measure(models[-1], "validation")
        verdict = validation_verdict(workspace, run_id, settings, models)
    return record_validations(workspace, run_id, settings, models)


def _train(run_id: str, workspace: str, settings: RunConfig, execution: Execution, which: tuple[str, int, int]) -> str:
    parent, round_index, drawn = which
    run_stage(
        training,
        execution,
        lambda: missing_models(workspace, run_id, round_index),
        f"training {run_id} round-{round_index}",
        run_id=run_id,
        parent_id=parent,
        round_index=round_index,
        drawn=drawn,
        workspace=workspace,
        config=settings,
    )
    if settings.alignment.redraw:  # a crash may have come between the commit and the end of the training
        remove_checkpoints(Workspace.open(workspace), run_id, f"round-{round_index}")
    return f"round-{round_index}"
