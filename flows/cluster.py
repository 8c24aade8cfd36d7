"""Shards of a stage as tasks on a Ray cluster: all at once, on whichever node has room."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import Task, get_run_logger
from prefect.task_runners import TaskRunner
from prefect.utilities.callables import get_call_parameters

from flows.dispatch import WorkersLost
from popalign_core.errors import InvalidInput
from popalign_core.execution import Execution
from storage.artifacts import ArtifactRef
from tasks.versions import OtherVersion, require_same_version

# How often Ray starts a shard again whose worker or node died.
RESTARTS = 3
CONNECT_SECONDS = 5.0
DEFAULT_PORT = 6379


def run_on_cluster(
    task: Task[..., Any],
    shards: Sequence[ArtifactRef],
    execution: Execution,
    arguments: Sequence[Any],
    finished: Callable[[], None],
) -> None:
    """Calls a task for each shard; `finished` after each.

    A shard whose worker or node dies is started again elsewhere by Ray, as the same task run.

    Raises: InvalidInput where there is no Ray, no such cluster, or no popalign on a node; OtherVersion; what a shard
    raised; WorkersLost, once all other shards are done, where one lost its worker RESTARTS + 1 times.
    """
    if not shards:
        return
    with _connected(execution) as runner:
        from prefect_ray.context import remote_options
        from ray.exceptions import RayError, RayTaskError

        _check_nodes(shards[0], execution.gpus_per_shard)
        # Without max_calls Ray ends the process after every task that uses a GPU, and the model with it.
        with remote_options(num_gpus=execution.gpus_per_shard, max_calls=0, max_retries=RESTARTS):
            calls = [get_call_parameters(task.fn, (shard, *arguments), {}) for shard in shards]
            futures = [runner.submit(task, call) for call in calls]
        lost: list[tuple[ArtifactRef, RayError]] = []
        for shard, future in zip(shards, futures, strict=True):
            try:
                future.result()
            except RayTaskError:
                raise
            except RayError as error:
                lost.append((shard, error))
            else:
                finished()
    if lost:
        shard, error = lost[0]
        raise WorkersLost(
            f"{len(lost)} of {len(shards)} shards lost their Ray worker or its node {RESTARTS + 1} times, first "
            f"{shard.table}/{shard.key} ({type(error).__name__}). Look at Ray's logs for what ended it (often a lack of "
            "memory), then retry this run: what is committed stays."
        ) from error


@contextmanager
def _connected(execution: Execution) -> Generator[TaskRunner[Any]]:
    """A runner on the cluster, or on one of this machine that ends with it."""
    try:
        import ray  # noqa: F401 (prefect-ray imports it where it is used, which is too late for a message)
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise InvalidInput(
            "execution.placement is ray, and prefect-ray is not installed: pip install 'popalign[ray]'."
        ) from error
    address = execution.ray_address
    if address:
        _check_address(address)
        runner = RayTaskRunner(address=address)
    else:
        runner = RayTaskRunner(address="local", init_kwargs={"include_dashboard": False})
    with _terminated_as_before():
        try:
            runner.__enter__()
        except (RuntimeError, ConnectionError, ValueError) as error:
            raise InvalidInput(f"the Ray cluster {address or 'of this machine'} cannot be used: {error}") from error
    try:
        yield runner
    finally:
        runner.__exit__(None, None, None)


def _check_address(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host or port, int(port) if host else DEFAULT_PORT), CONNECT_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"no Ray cluster answers at execution.ray_address={address} ({error}). Start one with `ray start --head`, "
            "or name the host:port that it printed."
        ) from error


@contextmanager
def _terminated_as_before() -> Generator[None]:
    """Ray makes SIGTERM an ordinary exit; to Prefect, it is a cancellation."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_nodes(shard: ArtifactRef, gpus: float) -> None:
    """Every node that shards fit on has the code that started the run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
