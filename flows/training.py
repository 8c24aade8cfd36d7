"""Preferences of a round -> the round's model."""

from prefect import flow

from flows.holding import holding
from flows.placement import resolved
from popalign_core.config import RunConfig
from popalign_core.execution import AUTO, Execution
from storage.artifacts import ArtifactRef
from tasks.alignment import align_round
from tasks.memory_plan import require_memory
from tasks.progress import expect
from tasks.run import reference, run_config
from tasks.shards import claim_each, missing_models
from tasks.training_order import trained_model
from tasks.training_processes import TrainingProcesses


@flow(name="training", flow_run_name="training {run_id} round {round_index}")
def training(  # noqa: PLR0913 - the form of a deployment
    run_id: str,
    parent_id: str = "base",
    round_index: int = 1,
    drawn: int = 1,
    workspace: str = "",
    config: RunConfig | None = None,
    execution: Execution = AUTO,
    seed_index: int = 0,
) -> ArtifactRef:
    """Fine-tunes the parent model on a round's preferences; goes on from the last checkpoint.

    Args:
        run_id: Names the run inside the workspace.
        parent_id: base, or the model of the round before.
        round_index: The round, from 1.
        drawn: The round whose preferences are used; another than the round itself only without redraw.
        workspace: Folder of the workspace; empty = the worker's own.
        config: Instead of the configuration that the run was started with.
        execution: Where the work is done.
        seed_index: 0 = the run's own training; any other is the round again with another training seed.
    """
    settings, execution = run_config(workspace, run_id, config), resolved(execution)
    with holding(workspace, run_id):
        preferences = reference(workspace, run_id, "populations", f"round-{drawn}")
        if settings.alignment.objective == "reward":
            preferences = reference(workspace, run_id, "prompts", "all")
        missing = missing_models(workspace, run_id, round_index, seed_index)
        processes = TrainingProcesses(
            execution.training_processes, execution.training_hosts, execution.training_rendezvous
        )
        # Several hosts make the same call and find each other; one host's call keeps others away.
        for _ in claim_each(missing) if processes.hosts == 1 else missing:
            require_memory(settings, execution, "training")
            expect(f"alignment {trained_model(round_index, seed_index)}", settings.alignment.steps, "steps")
            align_round(preferences, settings, parent_id, round_index, processes, seed_index)
    return reference(workspace, run_id, "models", trained_model(round_index, seed_index))
