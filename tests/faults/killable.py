"""A server with workers of its own, whose processes can be killed one by one."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

ROOT = Path(__file__).parents[2]
SOURCES = ("flows", "tasks", "popalign_core", "storage", "prefect.yaml", "pyproject.toml")
MARK = "POPALIGN_TEST_STACK"
GPU_WORKERS = ("gpu0", "gpu1")


def wait_for(what: str, happened: Callable[[], object], seconds: float = 900) -> None:
    """A server that does not answer has said nothing yet."""
    deadline, seen = time.monotonic() + seconds, None
    while not seen:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        with suppress(httpx.HTTPError):
            seen = happened()
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stack:
    """Server, one CPU worker and GPU workers without GPUs, from a copy of the sources that nobody edits meanwhile."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def database(self) -> Path:
        return self.folder / "home" / "prefect.db"

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONPATH": str(self.folder / "checkout"),
            "OMP_NUM_THREADS": "1",
            MARK: self.folder.name,
            **more,
        }

    def prefect(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", *arguments]
        checkout = self.folder / "checkout"
        subprocess.run(command, env=self.environment(), cwd=checkout, check=True, capture_output=True, timeout=300)

    def launch(self, name: str, *arguments: str, **more: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                env=self.environment(**more),
                cwd=self.folder / "checkout",
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def launch_server(self) -> None:
        self.launch("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port))
        wait_for("the server's health", self.healthy)

    def launch_worker(self, name: str, pool: str, limit: int, **more: str) -> None:
        arguments = ("--pool", pool, "--name", name, "--limit", str(limit))
        self.launch(name, "worker", "start", *arguments, CUDA_VISIBLE_DEVICES=name, **more)

    def new_gpu_workers(self, **more: str) -> None:
        """SIGKILLs the GPU workers that are there, not what they run, and starts others."""
        for name in GPU_WORKERS:
            if name in self.processes:
                self.kill(name)
            self.launch_worker(name, "popalign-gpu", 1, **more)

    def healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.api}/health", timeout=2).is_success
        return False

    def kill(self, name: str, *, group: bool = False) -> None:
        process = self.processes[name]
        if process.poll() is not None:
            return
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait(30)

    def run_processes(self, worker: str) -> list[tuple[int, str]]:
        """Process id and flow run id of what a worker runs; processes that a run started itself are left out."""
        found: list[tuple[int, str]] = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                values = dict(
                    part.split("=", 1)
                    for part in (process / "environ").read_bytes().decode().split("\0")
                    if "=" in part
                )
                mine = values.get(MARK) == self.folder.name and values.get("CUDA_VISIBLE_DEVICES") == worker
                engine = b"prefect.engine" in (process / "cmdline").read_bytes()
                if mine and engine and "PREFECT__FLOW_RUN_ID" in values:
                    found.append((int(process.name), values["PREFECT__FLOW_RUN_ID"]))
        return found

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: self.api}), get_client(sync_client=True) as client:
            yield client

    def named(self, beginning: str) -> list[FlowRun]:
        with self.client() as client:
            return [run for run in client.read_flow_runs() if run.name.startswith(beginning)]

    @contextmanager
    def locked_database(self) -> Iterator[None]:
        connection = sqlite3.connect(self.database, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
        connection.close()

    def stop(self) -> None:
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if f"{MARK}={self.folder.name}\0".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
        for process in self.processes.values():
            process.wait(30)
