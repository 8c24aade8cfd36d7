"""Settings of training that a run may go on with in other values: they decide how much memory it takes.

`gradient_checkpointing` changes no bit of the result, `micro_batch` rounding only. A run stays recorded as it was first
given; what a model was trained with instead is a fact in its manifest, `changed_settings`. A training checkpoint goes
on with the micro-batch that it was made with, and refuses any other.
"""

from collections.abc import Sequence

from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput
from popalign_core.presets import parse_settings
from storage.artifacts import is_committed
from tasks.run import reference, run_config

CHANGEABLE = ("gradient_checkpointing", "micro_batch")


def recorded_config(workspace: str, run_id: str, config: RunConfig) -> RunConfig:
    """What a run is recorded with, where the configuration differs from that in changeable settings alone; else it."""
    if not is_committed(reference(workspace, run_id, "runs", "config")):
        return config
    recorded = run_config(workspace, run_id)
    values = recorded.alignment.model_dump(include=set(CHANGEABLE))
    as_before = config.model_copy(update={"alignment": config.alignment.model_copy(update=values)})
    return recorded if as_before == recorded else config


def changed_settings(workspace: str, run_id: str, config: RunConfig) -> dict[str, object]:
    """The changeable settings that are not as the run was recorded with, by name with their values now."""
    recorded = recorded_config(workspace, run_id, config).alignment
    now = config.alignment.model_dump(include=set(CHANGEABLE))
    return {f"alignment.{name}": now[name] for name in CHANGEABLE if now[name] != getattr(recorded, name)}


def resumed_config(config: RunConfig, settings: Sequence[str]) -> RunConfig:
    """A run's configuration with changes to what may change, each "alignment.field=value". Raises: InvalidInput."""
    changes = parse_settings(settings)
    allowed = [f"alignment.{name}" for name in CHANGEABLE]
    if refused := [name for name in changes if name not in allowed]:
        raise InvalidInput(
            f"--resume goes on with preset and settings of the run, and got {', '.join(refused)}: only --set "
            f"execution.field=value, {' and '.join(allowed)} go with it."
        )
    return with_settings(config, changes)
