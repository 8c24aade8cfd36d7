"""Rounds of sampling, populations and fine-tuning, stopped by held-out disparity."""

from prefect import flow, get_run_logger

from flows.classification import classification
from flows.populations import populations
from flows.sampling import sampling
from popalign_core.config import RunConfig
from tasks.alignment import align_round
from tasks.counterfactuals import write_counterfactuals
from tasks.populations import has_pairs
from tasks.progress import expect
from tasks.run import BASE, run_config
from tasks.validation import record_validations, validation_verdict


@flow(name="alignment", flow_run_name="alignment {run_id}")
def alignment(
    run_id: str,
    workspace: str = "workspace",
    config: RunConfig | None = None,
) -> str:
    """Fine-tunes the model in rounds and returns the id of the model that is kept.

    In each round both populations are drawn from the current model, so the gradient vanishes as it arrives at the
    target; without `redraw` a round is a part of one long training on the base model's images. After each round
    disparity is measured on validation prompts; the best model is kept, and training stops when things turn.

    Args:
        run_id: Names the run inside the workspace.
        workspace: Folder of the workspace.
        config: Instead of the configuration that the run was started with.
    """
    settings = run_config(workspace, run_id, config)
    models = [BASE]
    _measure(run_id, BASE, "validation", workspace, settings)
    verdict = validation_verdict(workspace, run_id, settings, models)
    for round_index in range(1, settings.alignment.rounds + 1):
        if verdict.reason is not None and len(models) > 1:
            get_run_logger().info("stopping after round %d: %s", round_index - 1, verdict.reason)
            break
        parent, drawn = (models[-1], round_index) if settings.alignment.redraw else (BASE, 1)
        _measure(run_id, parent, f"round-{drawn}", workspace, settings)
        if settings.populations.winners == "counterfactual":
            write_counterfactuals(workspace, run_id, settings, parent, drawn)
            _measure(run_id, parent, f"counterfactual-{drawn}", workspace, settings)
        preferences = populations(run_id, parent, drawn, workspace, settings)
        if len(models) > 1 and not has_pairs(preferences):
            get_run_logger().info("stopping after round %d: no prompt has a pair left", round_index - 1)
            break
        expect(f"alignment round-{round_index}", settings.alignment.steps)
        model = align_round(preferences, settings, parent, round_index)
        models.append(model.key)
        _measure(run_id, model.key, "validation", workspace, settings)
        verdict = validation_verdict(workspace, run_id, settings, models)
    return record_validations(workspace, run_id, settings, models)


def _measure(run_id: str, model_id: str, purpose: str, workspace: str, config: RunConfig) -> None:
    sampling(run_id, model_id, purpose, workspace, config)
    classification(run_id, model_id, purpose, "builder", workspace, config)
