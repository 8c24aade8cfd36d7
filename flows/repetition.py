"""The kept round's training again with other seeds, all of it measured on held-out prompts."""

from flows.measuring import draw_and_classify
from flows.placement import run_stage
from flows.training import training
from popalign_core.config import RunConfig
from popalign_core.execution import Execution
from tasks.run import BASE
from tasks.seeds import record_seeds, round_of
from tasks.shards import missing_models
from tasks.training_order import trained_model


def repeat_training(run_id: str, kept: str, workspace: str, config: RunConfig, execution: Execution) -> None:
    """Trains as many models as `alignment.seeds` says, the kept one among them, and commits how far they differ.

    Same parent, same pairs: what differs is order, noise, timesteps and the start of an adapter. execution: resolved.
    """
    if config.alignment.seeds < 2:
        return
    number = round_of(kept)
    parent, drawn = (
        (trained_model(number - 1) if number > 1 else BASE, number) if config.alignment.redraw else (BASE, 1)
    )
    for index in range(1, config.alignment.seeds):
        model_id = trained_model(number, index)
        run_stage(
            training,
            execution,
            lambda index=index: missing_models(workspace, run_id, number, index),
            f"training {run_id} {model_id}",
            run_id=run_id,
            parent_id=parent,
            round_index=number,
            drawn=drawn,
            workspace=workspace,
            config=config,
            seed_index=index,
        )
        draw_and_classify(run_id, model_id, "evaluation", "judge", workspace, config, execution)
    record_seeds(workspace, run_id, config, kept)
