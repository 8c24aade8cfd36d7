"""The processes of `popalign up`: their commands and environments, and how one that dies comes back."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flows.machine import Plan
from flows.pools import CPU_POOL, GPU_POOL
from flows.services import HOST, services_folder
from flows.stopping import MARK, SERVICE, stop_orphans

FIRST_PAUSE, LONGEST_PAUSE, STABLE_SECONDS = 1.0, 30.0, 60.0
LARGEST_LOG = 20_000_000
# The database's address may hold a password, and a worker speaks to the server only.
DATABASE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
Say = Callable[[str], None]


class Child:
    """A process that is started again when it dies. environment: added to this process's own."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], project: Path):
        self.name = name
        self.log = services_folder() / f"{name}.log"
        self._command, self._environment, self._project = command, environment, project
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._pause = FIRST_PAUSE

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Starts the process in a session of its own: Ctrl-C reaches this process alone, which ends them in order."""
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._project,
                env=dict(self._environment) | {SERVICE: self.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self._started, self._due = time.monotonic(), 0.0

    def death(self) -> str:
        """Why the process is gone; empty while it runs."""
        code = self._process.poll() if self._process else None
        if code is None:
            return ""
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill_silent(self, say: Say) -> None:
        """Ends a process that runs and is not heard of; `revive` starts it again."""
        if self._process and self._process.poll() is None:
            say(f"{self.name} runs, and the server has not heard of it for minutes: it is started again")
            self._process.kill()
            self._process.wait()

    def revive(self, say: Say) -> bool:
        """Starts a process that died after a pause, the longer the more often. Returns: whether it did."""
        death = self.death()
        if not death:
            return False
        if not self._due:
            if time.monotonic() - self._started > STABLE_SECONDS:
                self._pause = FIRST_PAUSE
            say(f"{self.name} ended ({death}); it starts again in {self._pause:.0f} s. Its log: {self.log}")
            self._due = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if time.monotonic() < self._due:
            return False
        # Its runs would share the device with those that it takes next.
        if self.name.startswith("gpu") and (ended := stop_orphans(self.name)):
            say(f"{self.name}: ended {ended} processes of runs that it had left behind")
        self.start()
        say(f"{self.name} runs again (process {self.pid})")
        return True


def children_of(plan: Plan) -> list[Child]:
    """The server first, then the workers."""
    host = socket.gethostname().split(".")[0]
    prefect = [sys.executable, "-m", "prefect"]
    common = common_environment(plan)
    server = [*prefect, "server", "start", "--host", HOST, "--port", str(plan.port)]
    workers = [(f"cpu-{host}", CPU_POOL, "", plan.cpu_limit)]
    workers += [(f"gpu{number}-{host}", GPU_POOL, device, 1) for number, device in enumerate(plan.devices)]
    if not plan.devices:
        workers.append((f"gpu-{host}", GPU_POOL, "", 1))
    children = [Child("server", server, common | server_environment(plan), plan.project)]
    for name, pool, device, limit in workers:
        command = [
            *prefect,
            "worker",
            "start",
            "--pool",
            pool,
            "--name",
            name,
            "--limit",
            str(limit),
            "--type",
            "process",
        ]
        environment = {key: value for key, value in common.items() if key not in DATABASE}
        children.append(Child(name, command, environment | {"CUDA_VISIBLE_DEVICES": device}, plan.project))
    return children


def common_environment(plan: Plan) -> dict[str, str]:
    """What every process gets: this process's environment with the server's address, the workspace and the mark."""
    inherited = dict(os.environ)
    # Without the proxies that are for other hosts.
    local = ",".join(filter(None, (inherited.get("NO_PROXY") or inherited.get("no_proxy"), HOST, "localhost")))
    return inherited | {
        "NO_PROXY": local,
        "no_proxy": local,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), inherited.get("PATH", os.defpath))),
        "PREFECT_API_URL": plan.api_url,
        # The zombie automation expects a sign of life every 30 s.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": inherited.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
        "POPALIGN_WORKSPACE": str(plan.workspace),
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "DO_NOT_TRACK": "1",
        MARK: str(services_folder()),
    }


def server_environment(plan: Plan) -> dict[str, str]:
    """What the server gets besides: addresses for the chosen port, and nothing that calls home or advertises."""
    return {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(plan.port),
        "PREFECT_SERVER_UI_API_URL": plan.api_url,
        "PREFECT_UI_URL": f"http://{HOST}:{plan.port}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }


def _end_with_parent() -> None:
    """Runs in the child: where the supervisor is killed, its children are told to end."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
