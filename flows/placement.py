"""Where a stage runs: in this process, on a Ray cluster, or as runs of its deployment on workers. The one switch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from prefect import Flow, Task
from prefect.runtime import deployment
from prefect.variables import Variable

from flows.dispatch import dispatch
from flows.pools import PLACEMENT_VARIABLE
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef, is_committed
from storage.errors import RunInUse
from storage.tables import read_artifact
from tasks.progress import report_progress
from tasks.shards import claim_each

# The stages that call run_shards. The others, which run here, want the GPUs' memory.
FAN_OUT = ("sampling", "classification")
Missing = Callable[[], Sequence[ArtifactRef]]


def resolved(execution: Execution) -> Execution:
    """With auto replaced: what the server's variable says where a worker runs this, else this process."""
    if execution.placement != "auto":
        return execution
    # Only a deployment's run belongs to a server that has workers; the command line works by itself.
    wanted = Variable.get(PLACEMENT_VARIABLE, default="process") if deployment.id else "process"
    placement: Literal["process", "workers"] = "workers" if wanted == "workers" else "process"
    return execution.model_copy(update={"placement": placement})


def run_stage(stage: Flow[..., Any], execution: Execution, missing: Missing, name: str, **parameters: Any) -> None:
    """Runs a stage where the work is placed, until nothing is missing.

    name: of the runs on workers. missing: what is left, read from the disk. Raises: StageFailed, WorkersLost, RunInUse.
    """
    if execution.placement == "workers":
        dispatch(stage.name, execution, missing, name, parameters)
    else:
        if execution.placement == "ray" and stage.name not in FAN_OUT:
            from flows.cluster import disconnect

            disconnect()
        stage(**parameters, execution=execution)
    if left := missing():
        raise RunInUse(
            f"{name}: another process is making {len(left)} pieces of it, first {left[0].table}/{left[0].key}. "
            "Wait for it or stop it, then run again with the same run id."
        )


def run_shards(
    task: Task[..., Any], shards: Sequence[ArtifactRef], execution: Execution, *arguments: Any, work: str = ""
) -> None:
    """Calls a task for each shard: one after another here, all at once on a Ray cluster.

    work: announced progress that a finished shard counts to on a cluster, whose processes cannot report it themselves.
    """
    limited = task.with_options(timeout_seconds=execution.shard_timeout_seconds)
    if execution.placement != "ray":
        # Called and not submitted: a thread could neither be timed out nor cancelled.
        for shard in claim_each(shards):
            limited(shard, *arguments)
        return
    # Only then: it loads much that other placements do not need.
    from flows.cluster import run_on_cluster

    run_on_cluster(limited, shards, execution, arguments, lambda shard: report_progress(work, _items(shard)))


def _items(shard: ArtifactRef) -> int:
    """How many images a shard is of, by the record of its making."""
    timing = replace(shard, table="timings", key=f"{shard.table}-{shard.key}")
    return read_artifact(timing, "timings")[0]["items"] if is_committed(timing) else 0
