"""Base and aligned model on held-out prompts, and the decision."""

from prefect import flow

from flows.classification import classification
from flows.sampling import sampling
from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef
from tasks.assessment import assess
from tasks.run import BASE, run_config

PURPOSES = ("evaluation", "trained", "obedience")


@flow(name="assessment", flow_run_name="assessment {run_id} {model_id}")
def assessment(
    run_id: str,
    model_id: str = "round-1",
    workspace: str = "workspace",
    config: RunConfig | None = None,
) -> ArtifactRef:
    """Measures disparity, obedience and quality of the base and the aligned model, and decides.

    Args:
        run_id: Names the run inside the workspace.
        model_id: The model to compare with the base.
        workspace: Folder of the workspace.
        config: Instead of the configuration that the run was started with.
    """
    settings = run_config(workspace, run_id, config)
    for model in dict.fromkeys((BASE, model_id)):
        for purpose in PURPOSES:
            sampling(run_id, model, purpose, workspace, settings)
            classification(run_id, model, purpose, "judge", workspace, settings)
    return assess(workspace, run_id, settings, model_id)
