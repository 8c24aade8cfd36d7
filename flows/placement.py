"""Where a stage runs: in this process, on a Ray cluster, or as runs of its deployment on workers. The one switch."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from prefect import Flow, Task
from prefect.runtime import deployment
from prefect.task_runners import TaskRunner
from prefect.variables import Variable

from flows.dispatch import dispatch
from popalign_core.errors import InvalidInput
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
    elif execution.placement == "ray":
        stage.with_options(task_runner=_ray(execution))(**parameters, execution=execution)
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
    """Calls a task for each shard: one after another here, all at once where the flow's runner is a cluster.

    work: announced progress that a finished task of a cluster, which cannot report itself, counts to.
    """
    limited = task.with_options(timeout_seconds=execution.shard_timeout_seconds)
    if execution.placement != "ray":
        # Called and not submitted: a thread could neither be timed out nor cancelled.
        for shard in claim_each(shards):
            limited(shard, *arguments)
        return
    from prefect_ray.context import remote_options

    # Without max_calls Ray ends the process after every task that uses a GPU, and the model with it.
    with remote_options(num_gpus=execution.gpus_per_shard, max_calls=0):
        futures = [limited.submit(shard, *arguments) for shard in shards]
    for future in futures:
        future.result()
        report_progress(work, 1)


def _ray(execution: Execution) -> TaskRunner[Any]:
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise InvalidInput(
            "execution.placement is ray, and prefect-ray is not installed: pip install 'popalign[ray]'."
        ) from error
    if execution.ray_address:
        return RayTaskRunner(address=execution.ray_address)
    return RayTaskRunner(init_kwargs={"include_dashboard": False})
