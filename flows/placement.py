"""Where a stage runs: in this process, on a Ray cluster, or as runs of its deployment on workers. The one switch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from prefect import Flow, Task
from prefect.runtime import deployment
from prefect.variables import Variable

from flows.cluster import run_on_cluster
from flows.dispatch import dispatch
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef
from storage.errors import RunInUse
from tasks.progress import report_progress
from tasks.shards import claim_each

PLACEMENT_VARIABLE = "popalign_placement"
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
        stage(**parameters, execution=execution)
    if left := missing():
        raise RunInUse(
            f"{name}: another process is making {len(left)} pieces of it, first {left[0].table}/{left[0].key}. "
            "Wait for it or stop it, then run again with the same run id."
        )


def run_shards(
    task: Task[..., Any], shards: Sequence[ArtifactRef], execution: Execution, *arguments: Any, work: str = ""
) -> None:
    """Calls a task for each shard: one after another here, or all at once on a Ray cluster.

    work: announced progress that a finished shard of the cluster, which cannot report itself, counts to.
    """
    limited = task.with_options(timeout_seconds=execution.shard_timeout_seconds)
    if execution.placement == "ray":
        run_on_cluster(limited, shards, execution, arguments, lambda: report_progress(work, 1))
        return
    # Called and not submitted: a thread could neither be timed out nor cancelled.
    for shard in claim_each(shards):
        limited(shard, *arguments)
