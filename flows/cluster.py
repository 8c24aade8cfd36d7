"""Shards of a stage as tasks on a Ray cluster: all at once, on whichever node has room."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from prefect import Task, get_run_logger
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner
from prefect.utilities.callables import get_call_parameters

from flows.dispatch import SECONDS_BEFORE_AGAIN, WorkersLost
from popalign_core.errors import InvalidInput
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef, is_committed
from storage.locks import claimed
from tasks.versions import require_same_version

# How often Ray starts a shard again whose worker or node died.
RESTARTS = 3
CONNECT_SECONDS = 5.0
# Only references pass through it; Ray's default is a third of the memory. At least 75 MB.
OBJECT_STORE_BYTES = 100_000_000
# What Prefect says in a process that finds no server, before the task begins: one that restarts is soon back.
NO_SERVER = "Failed to reach API"
ON_EVERY_NODE = (
    "Every node needs the same popalign and the same workspace, and must reach the server at the address that "
    "PREFECT_API_URL has where the run was started."
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Finished = Callable[[ArtifactRef], None]
_connected_to: list[str] = []


def run_on_cluster(
    task: Task[..., Any],
    shards: Sequence[ArtifactRef],
    execution: Execution,
    arguments: Sequence[Any],
    finished: Finished,
) -> None:
    """Calls a task for each shard that nobody else is at; `finished` for each once it is committed.

    A shard whose worker or node dies is started again elsewhere by Ray, as the same task run. What another process is
    at, and what found no server, is tried again after pauses.

    Raises: InvalidInput where there is no Ray, no such cluster, no popalign on a node, or no server for it;
    OtherVersion; what a shard raised; WorkersLost, once the others are done, where one lost its worker again and again.
    """
    if not shards:
        return
    with _connected(execution) as runner:
        _warn_if_nothing_fits(execution.gpus_per_shard)
        left, unreached = list(shards), None
        for pause in (*SECONDS_BEFORE_AGAIN, None):
            unreached = _run_each(runner, task, left, execution, arguments, finished)
            left = [shard for shard in left if not is_committed(shard)]
            if not left:
                return
            get_run_logger().warning(
                "%d shards are left: %s", len(left), unreached or "another process has claimed them"
            )
            if pause is not None:
                time.sleep(pause)
        if unreached is not None:
            raise unreached


def _run_each(
    runner: TaskRunner[Any],
    task: Task[..., Any],
    shards: Sequence[ArtifactRef],
    execution: Execution,
    arguments: Sequence[Any],
    finished: Finished,
) -> InvalidInput | None:
    """The error, if shards were not begun because a node did not reach the server."""
    import ray
    from prefect_ray.context import remote_options
    from ray.exceptions import RayError, RayTaskError

    shared = claiming(task)
    calls = [get_call_parameters(task.fn, (shard, *arguments), {}) for shard in shards]
    # Without max_calls Ray ends the process after every task that uses a GPU, and the model with it.
    options = remote_options(num_gpus=execution.gpus_per_shard, max_calls=0, max_retries=RESTARTS)
    with options, _api_of_this_process():
        futures = [runner.submit(shared, call) for call in calls]
    waiting = {future.wrapped_future: (shard, future) for shard, future in zip(shards, futures, strict=True)}
    lost: list[tuple[ArtifactRef, Exception]] = []
    unreached: InvalidInput | None = None
    while waiting:
        shard, future = waiting.pop(ray.wait(list(waiting))[0][0])
        try:
            future.result()
        except RayTaskError as error:
            unreached = InvalidInput(f"a node of the Ray cluster cannot run popalign: {error.cause}. {ON_EVERY_NODE}")
            if NO_SERVER not in str(error.cause):
                raise unreached from error
        except RayError as error:
            lost.append((shard, error))
        else:
            if is_committed(shard):
                finished(shard)
    if lost:
        raise _workers_lost(lost, len(shards))
    return unreached


def _workers_lost(lost: Sequence[tuple[ArtifactRef, Exception]], total: int) -> WorkersLost:
    shard, error = lost[0]
    return WorkersLost(
        f"{len(lost)} of {total} shards lost their Ray worker or its node {RESTARTS + 1} times, first "
        f"{shard.table}/{shard.key} ({type(error).__name__}). Look at Ray's logs for what ended it (often a lack of "
        "memory), then retry this run: what is committed stays."
    )


def claiming(task: Task[..., Any]) -> Task[..., Any]:
    """The same task, which leaves a shard alone that another process is at; to be claimed where it is made."""
    make = task.fn

    @wraps(make)
    def claim(ref: ArtifactRef, *arguments: Any, **more: Any) -> ArtifactRef:
        require_same_version(ref.workspace, ref.run_id)
        with claimed(ref) as mine:
            return make(ref, *arguments, **more) if mine else ref

    changed = task.with_options()
    changed.fn = claim
    return changed


@contextmanager
def _api_of_this_process() -> Generator[None]:
    """Tells the cluster's processes where the server is; else each starts a temporary one of its own, for 12 s."""
    with get_client(sync_client=True) as client:
        address = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: address}):
        yield


@contextmanager
def _connected(execution: Execution) -> Generator[TaskRunner[Any]]:
    """A runner on the cluster. The connection stays, and with it the cluster's processes and the models in them."""
    address = execution.ray_address
    if not address or _check_address(address) in LOOPBACK:
        # Read when Ray is imported. Else it takes this machine's own address for the loopback's, and listens on all.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Else Ray reports its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise InvalidInput(
            "execution.placement is ray, and prefect-ray is not installed: pip install 'popalign[ray]'."
        ) from error
    _connect(address)
    try:
        with RayTaskRunner() as runner:
            yield runner
    except BaseException:
        # Ends what is still at work.
        disconnect()
        raise


def _connect(address: str) -> None:
    import ray

    if ray.is_initialized() and _connected_to == [address]:
        return
    ray.shutdown()
    try:
        # What a shard writes goes to Ray's logs and to the task run's page, and not across the bars of a terminal.
        with _same_sigterm():
            if address:
                ray.init(address, namespace="popalign", log_to_driver=False, logging_level=logging.WARNING)
            else:
                ray.init(
                    "local",
                    namespace="popalign",
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                )
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise InvalidInput(f"the Ray cluster {address or 'of this machine'} cannot be used: {error}") from error
    _connected_to[:] = [address]


def disconnect() -> None:
    """Ends the cluster's processes that work for this one, which gives back the memory of their GPUs."""
    if _connected_to:
        import ray

        ray.shutdown()
        _connected_to.clear()


def _check_address(address: str) -> str:
    """The host, if somebody answers there: Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    host = host.strip("[]")
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS):
            return host
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"no Ray cluster answers at execution.ray_address={address} ({error}). Start one with `ray start --head`, "
            "and give the host:port that it prints."
        ) from error


@contextmanager
def _same_sigterm() -> Generator[None]:
    """Ray makes an ordinary exit of SIGTERM, which to Prefect is a cancellation."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _warn_if_nothing_fits(gpus: float) -> None:
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(resources.get("CPU", 0) >= 1 and resources.get("GPU", 0) >= gpus for resources in found):
        get_run_logger().warning(
            "no node of the Ray cluster has a CPU and %g GPUs: the work waits until one comes", gpus
        )
