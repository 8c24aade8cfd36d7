"""Runs of a stage's deployment on the workers of the GPU pool, watched until the work is on the disk."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.context import TagsContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling
from pydantic import TypeAdapter

from flows.pools import GPU_POOL
from popalign_core.errors import InvalidInput, PopalignError
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef
from tasks.progress import expect, report_progress

GPU_DEPLOYMENT = "gpu"
POLL_SECONDS = 2.0
SECONDS_BEFORE_AGAIN = (5.0, 30.0, 120.0)
# For a run whose work is done to say so: of a host that is gone nobody will, until it is marked as crashed.
SECONDS_TO_END = 30.0
ACTIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED]
Missing = Callable[[], Sequence[ArtifactRef]]


class StageFailed(PopalignError):
    """A run of a stage on a worker ended with an error that another try would meet again."""


class WorkersLost(PopalignError):
    """Workers died again and again before a stage was done."""


def dispatch(stage: str, execution: Execution, missing: Missing, name: str, parameters: dict[str, Any]) -> None:
    """Starts as many runs of the stage as there are workers; those of workers that die are started again.

    A run that an earlier attempt of this flow started and that is still at work is taken over. When this process is
    stopped, the runs are cancelled. name: of the runs; the same work has the same name in every attempt.
    Raises: StageFailed with the run's message; WorkersLost.
    """
    values = TypeAdapter(dict[str, Any]).dump_python(parameters, mode="json")
    values["execution"] = execution.model_copy(update={"placement": "process"}).model_dump(mode="json")
    for pause in (*SECONDS_BEFORE_AGAIN, None):
        left = len(missing())
        if not left:
            return
        expect(name, left, "pieces")
        with get_client(sync_client=True) as client:
            runs = _active_runs(client, stage, values)
            for number in range(len(runs), _runs_at_once(client, stage, execution, left)):
                runs.append(_start(stage, f"{name} ({number + 1})", values))
            ended = _wait(client, runs, missing, name)
        _raise_failures(ended)
        if not missing():
            return
        lost = [run.name for run in ended if run.state is not None and run.state.is_crashed()]
        get_run_logger().warning("%d pieces of %s are left, lost runs: %s", len(missing()), name, ", ".join(lost))
        if pause is not None:
            time.sleep(pause)
    raise WorkersLost(
        f"{name}: workers died in each of {len(SECONDS_BEFORE_AGAIN) + 1} attempts, and {len(missing())} pieces are "
        "missing. Look at the log of the last crashed run, then retry this run: what is committed stays."
    )


def _runs_at_once(client: SyncPrefectClient, stage: str, execution: Execution, left: int) -> int:
    if stage == "training":
        return execution.training_hosts
    return min(left, execution.stage_runs or _workers_online(client))


def _workers_online(client: SyncPrefectClient) -> int:
    workers = client.read_workers_for_work_pool(GPU_POOL)
    online = sum(worker.status == WorkerStatus.ONLINE for worker in workers)
    if not online:
        get_run_logger().warning("no worker of %s is online: the work waits until one comes", GPU_POOL)
    return max(online, 1)


def _start(stage: str, name: str, values: dict[str, Any]) -> FlowRun:
    try:
        tags = {"popalign", *TagsContext.get().current_tags}
        deployment = f"{stage}/{GPU_DEPLOYMENT}"
        started = run_deployment(deployment, parameters=values, flow_run_name=name, timeout=0, tags=tags)
        return cast("FlowRun", started)  # a coroutine only where an event loop runs
    except ObjectNotFound as error:
        raise InvalidInput(
            f"there is no deployment {stage}/{GPU_DEPLOYMENT} on this server: run `popalign setup` from a checkout, or "
            "choose the placement process."
        ) from error


def _active_runs(client: SyncPrefectClient, stage: str, values: dict[str, Any]) -> list[FlowRun]:
    """Runs of the same work that are not over: of a parent that died."""
    try:
        deployment = client.read_deployment_by_name(f"{stage}/{GPU_DEPLOYMENT}")
    except ObjectNotFound:
        return []
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ACTIVE))),
    )
    return [run for run in found if run.parameters == values]


def _wait(client: SyncPrefectClient, runs: Sequence[FlowRun], missing: Missing, name: str) -> list[FlowRun]:
    """The runs that ended, once all have or nothing is left to do; if this process is stopped, it cancels them."""
    left, open_runs, ended, done_at = len(missing()), {run.id: run for run in runs}, list[FlowRun](), None
    try:
        while open_runs and (done_at is None or time.monotonic() - done_at < SECONDS_TO_END):
            time.sleep(POLL_SECONDS)
            for run_id in list(open_runs):
                open_runs[run_id] = run = _read(client, open_runs[run_id])
                if run.state is not None and run.state.is_final():
                    ended.append(run)
                    del open_runs[run_id]
            still = len(missing())
            report_progress(name, left - still)
            left = still
            if not left and done_at is None:
                done_at = time.monotonic()
    except BaseException:
        for run_id in open_runs:
            client.set_flow_run_state(run_id, Cancelling(message="the run that started this one was stopped"))
        raise
    for run in open_runs.values():
        if run.state is not None and run.state.is_scheduled():
            client.set_flow_run_state(run.id, Cancelled(message="others did its work before a worker took it"))
    return ended


def _read(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    try:
        return client.read_flow_run(run.id)
    except httpx.HTTPError:
        # A server that restarts: what counts is on the disk, and the runs go on meanwhile.
        return run


def _raise_failures(ended: Sequence[FlowRun]) -> None:
    for run in ended:
        state = run.state
        if state is not None and (state.is_failed() or state.is_cancelled()):
            name = state.name or str(state.type)
            said = (state.message or name).removeprefix("Flow run encountered an exception: ")
            raise StageFailed(f"{run.name} ended as {name.lower()}: {said} (its log is on that run's page)")
