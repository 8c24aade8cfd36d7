"""Where a run's work is done. Not part of the run's identity: the same run may go on anywhere, to the same bytes."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from popalign_core.config import StageConfig
from popalign_core.errors import InvalidInput
from popalign_core.presets import parse_settings


class Execution(StageConfig):
    """Which processes do the work, how many, and how long one piece may take."""

    placement: Annotated[
        Literal["auto", "process", "workers", "ray"],
        Field(
            title="Placement",
            description="One process; workers of the GPU pool; a Ray cluster. auto: as the server is set up, else one.",
        ),
    ] = "auto"
    stage_runs: Annotated[
        int,
        Field(title="Runs of a stage at once", ge=0, description="On workers; 0 = as many as workers are online."),
    ] = 0
    shard_timeout_minutes: Annotated[
        float, Field(title="Longest shard", ge=0, description="Minutes until a shard is given up and retried; 0 = any.")
    ] = 0.0
    training_processes: Annotated[
        int, Field(title="Training processes", ge=1, description="Processes of a training on one machine, one a GPU.")
    ] = 1
    training_hosts: Annotated[
        int, Field(title="Training hosts", ge=1, description="Workers, one a host, that train one model together.")
    ] = 1
    training_rendezvous: Annotated[
        str,
        Field(title="Where hosts meet", description="host:port of one of the training hosts, where there are several."),
    ] = ""
    ray_address: Annotated[
        str, Field(title="Ray cluster", description="Its address; empty = one on this machine, ended with the run.")
    ] = ""
    gpus_per_shard: Annotated[
        float, Field(title="GPUs a shard", ge=0, description="What Ray reserves for a shard; fractions share a GPU.")
    ] = 0.0
    memory_check: Annotated[
        bool,
        Field(title="Memory check", description="Refuse before loading what cannot fit on the device; off: try it."),
    ] = True

    @property
    def shard_timeout_seconds(self) -> float | None:
        """None where a shard may take any time."""
        return 60 * self.shard_timeout_minutes or None


AUTO = Execution()


def parse_execution(settings: Sequence[str]) -> Execution:
    """From "field=value". Raises: InvalidInput with one line a fault."""
    try:
        return Execution.model_validate(parse_settings(settings))
    except ValidationError as error:
        faults = [f"execution.{'.'.join(map(str, f['loc']))}: {f['msg']} (got {f['input']!r})" for f in error.errors()]
        raise InvalidInput("; ".join(faults) + f". Known: {', '.join(Execution.model_fields)}.") from error
