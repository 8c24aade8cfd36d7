"""Base and aligned model on held-out prompts, and the decision."""

from prefect import flow

from flows.holding import holding
from flows.measurement import measurement
from flows.measuring import classify, draw_and_classify
from flows.placement import resolved, run_stage
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef
from tasks.agreement import PURPOSE as AGREEMENT
from tasks.controls import PURPOSE as CONTROLS
from tasks.precision import extend_evaluation
from tasks.run import BASE, reference, run_config
from tasks.sampling import EVALUATION
from tasks.shards import missing_decisions

PURPOSES = (EVALUATION, "trained", "obedience")


@flow(name="assessment", flow_run_name="assessment {run_id} {model_id}")
def assessment(
    run_id: str,
    model_id: str = "round-1",
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
) -> ArtifactRef:
    """Measures disparity, obedience and quality of the base and the aligned model, and decides.

    Args:
        run_id: Names the run inside the workspace.
        model_id: The model to compare with the base.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
    """
    settings, execution = run_config(workspace, run_id, config), resolved(execution)
    with holding(workspace, run_id):
        purposes = (*PURPOSES, CONTROLS) if settings.expansion.controls else PURPOSES
        models = tuple(dict.fromkeys((BASE, model_id)))
        for model in models:
            for purpose in purposes:
                draw_and_classify(run_id, model, purpose, "judge", workspace, settings, execution)
        while extend_evaluation(workspace, run_id, settings, model_id):
            for model in models:
                draw_and_classify(run_id, model, EVALUATION, "judge", workspace, settings, execution)
        for model in models:
            if settings.expansion.controls:
                classify(run_id, model, CONTROLS, "builder", workspace, settings, execution)
            if settings.classification.agreement:
                classify(run_id, model, AGREEMENT, "builder", workspace, settings, execution)
        run_stage(
            measurement,
            execution,
            lambda: missing_decisions(workspace, run_id, model_id),
            f"measurement {run_id} {model_id}",
            run_id=run_id,
            model_id=model_id,
            workspace=workspace,
            config=settings,
        )
    return reference(workspace, run_id, "disparities", model_id)
