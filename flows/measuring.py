"""Images of one purpose and what they are perceived as: the two stages that every other part of a run needs."""

from typing import Literal

from flows.classification import classification
from flows.placement import run_stage
from flows.sampling import sampling
from popalign_core.config import RunConfig
from popalign_core.execution import Execution
from tasks.shards import missing_attributes, missing_samples


def draw_and_classify(
    run_id: str,
    model_id: str,
    purpose: str,
    role: Literal["builder", "judge"],
    workspace: str,
    config: RunConfig,
    execution: Execution,
) -> None:
    """Runs sampling and classification of one purpose where the work is placed. execution: resolved."""
    run_stage(
        sampling,
        execution,
        lambda: missing_samples(workspace, run_id, config, model_id, purpose),
        f"sampling {run_id} {model_id} {purpose}",
        run_id=run_id,
        model_id=model_id,
        purpose=purpose,
        workspace=workspace,
        config=config,
    )
    classify(run_id, model_id, purpose, role, workspace, config, execution)


def classify(
    run_id: str,
    model_id: str,
    purpose: str,
    role: Literal["builder", "judge"],
    workspace: str,
    config: RunConfig,
    execution: Execution,
) -> None:
    """The same of images that are drawn already."""
    run_stage(
        classification,
        execution,
        lambda: missing_attributes(workspace, run_id, config, model_id, purpose, role),
        f"classification {run_id} {model_id} {purpose} {role}",
        run_id=run_id,
        model_id=model_id,
        purpose=purpose,
        workspace=workspace,
        config=config,
        role=role,
    )
