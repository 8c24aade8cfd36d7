"""A Prefect server of its own, processes of `sleeping_shards.py` that use it, and what they and it did."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("sleeping_shards.py")
EDGE = 100
WALL, CPU = 0, 1
QUIET_SECONDS = 10.0
LONG_SHARDS, LONG_SECONDS = 1000, 10.0


Instant = tuple[float, float]


@dataclass(frozen=True)
class Sleep:
    """Of one shard. begin, end: monotonic clock, CPU time of the process."""

    name: str
    begin: Instant
    end: Instant


@dataclass(frozen=True)
class Measured:
    """One form of the work. sleeps: by process, in order. cpu: seconds of what was started directly."""

    begin: float
    end: float
    sleeps: list[list[Sleep]]
    cpu: float
    load: tuple[float, float]

    @property
    def names(self) -> list[str]:
        return [sleep.name for mine in self.sleeps for sleep in mine]

    @property
    def before(self) -> float:
        """Seconds from the start to the first sleep."""
        return min(mine[0].begin[WALL] for mine in self.sleeps) - self.begin

    @property
    def after(self) -> float:
        """Seconds from the last sleep to the end."""
        return self.end - max(mine[-1].end[WALL] for mine in self.sleeps)

    def gaps(self, clock: int, part: slice = slice(None)) -> list[float]:
        """Seconds between a sleep and the next of the same process. part: of each process's sleeps."""
        pairs = (pair for mine in self.sleeps for pair in pairwise(mine[part]))
        return [later.begin[clock] - sooner.end[clock] for sooner, later in pairs]

    def growth(self, clock: int) -> float:
        """Median of the last gaps over that of the first; a process's very first loads what all others reuse."""
        return median(self.gaps(clock, slice(-EDGE, None))) / median(self.gaps(clock, slice(1, EDGE + 1)))

    def numbers(self) -> dict[str, Any]:
        return {
            "wall_s": self.end - self.begin,
            "slept_s": sum(sleep.end[WALL] - sleep.begin[WALL] for mine in self.sleeps for sleep in mine),
            "cpu_s": self.cpu,
            "before_s": self.before,
            "after_s": self.after,
            "gap_s": spread(self.gaps(WALL)),
            "gap_cpu_s": spread(self.gaps(CPU)),
            "last_to_first": self.growth(WALL),
            "last_to_first_cpu": self.growth(CPU),
            "shards_by_process": [len(mine) for mine in self.sleeps],
            "load": self.load,
        }


def spread(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100)
    places = {f"p{percent}": cuts[percent - 1] for percent in (5, 50, 95, 99)}
    return {"mean": fmean(values), **places, "max": max(values)}


def beyond(measured: Measured, peer: Measured) -> dict[str, float]:
    """What a form costs more than its peer, and that in percent of LONG_SHARDS of LONG_SECONDS on its processes.

    The time before the first and after the last sleep counts whole, with the start of Python and imports.
    """
    shard = fmean(measured.gaps(WALL)) - fmean(peer.gaps(WALL))
    fixed, each = measured.before + measured.after, LONG_SHARDS / len(measured.sleeps)
    return {
        "seconds_a_shard": shard,
        "cpu_seconds_a_shard": fmean(measured.gaps(CPU)) - fmean(peer.gaps(CPU)),
        "fixed_seconds": fixed,
        "percent": 100 * (fixed + each * shard) / (each * LONG_SECONDS),
    }


@dataclass
class Bench:
    """A folder with a server, and whatever works for it."""

    folder: Path
    port: int
    server: subprocess.Popen[bytes] | None = None

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def environment(self, log: Path, seconds: float) -> dict[str, str]:
        log.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_API_URL": self.api,
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "POPALIGN_BENCH_LOG": str(log),
            "POPALIGN_BENCH_SECONDS": str(seconds),
        }

    @contextmanager
    def prefect(self, name: str, arguments: str, environment: dict[str, str]) -> Generator[subprocess.Popen[bytes]]:
        """A command of Prefect, in a session of its own that is ended with it."""
        command = [sys.executable, "-m", "prefect", *arguments.split()]
        with (self.folder / f"{name}.log").open("ab") as log:
            started = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            yield started
        finally:
            os.killpg(started.pid, signal.SIGTERM)
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()

    @contextmanager
    def serving(self) -> Generator[None]:
        """The server, once it answers."""
        environment = self.environment(self.folder / "server-sleeps", 0)
        with self.prefect("server", f"server start --host 127.0.0.1 --port {self.port}", environment) as self.server:
            wait_for("the server", lambda: httpx.get(f"{self.api}/health", timeout=2).is_success)
            yield

    @contextmanager
    def working(self, name: str, form: str, seconds: float) -> Generator[None]:
        """A worker of the GPU pool whose shards are logged for a form."""
        environment = self.environment(self.sleeps(form), seconds)
        arguments = f"worker start --pool popalign-gpu --name {name} --limit 1"
        with self.prefect(name, arguments, environment):
            url = f"{self.api}/work_pools/popalign-gpu/workers/filter"
            wait_for(name, lambda: any(worker["name"] == name for worker in httpx.post(url, json={}).json()))
            yield

    def sleeps(self, form: str) -> Path:
        return self.folder / f"{form}-sleeps"

    def call(self, *arguments: str) -> None:
        command = [sys.executable, str(SCRIPT), *arguments]
        environment = self.environment(self.folder / "no-sleeps", 0)
        subprocess.run(command, env=environment, cwd=self.folder, check=True)

    def measure(self, name: str, commands: list[str], seconds: float) -> Measured:
        """Starts processes at once, each "FORM [PART PARTS]" in the workspace of that name, and waits for all."""
        place = str(self.folder / name)
        self.call("prepare", place)
        environment = self.environment(self.sleeps(name), seconds)
        load, used = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.monotonic()
        running: list[subprocess.Popen[bytes]] = []
        for form, *parts in map(str.split, commands):
            command = [sys.executable, str(SCRIPT), form, place, *parts]
            running.append(subprocess.Popen(command, env=environment, cwd=self.folder))
        try:
            assert [process.wait() for process in running] == [0] * len(running)
        finally:
            for process in running:
                process.kill()
        end = time.monotonic()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        logs = sorted(self.sleeps(name).iterdir())
        sleeps = [[Sleep(*json.loads(line)) for line in path.read_text().splitlines()] for path in logs]
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return Measured(begin, end, sleeps, cpu, (load, os.getloadavg()[0]))

    def rows(self) -> dict[str, int]:
        """Rows by table, two counts of what must have arrived, and bytes of the database."""
        database = sqlite3.connect(f"file:{self.folder}/home/prefect.db?mode=ro", uri=True, timeout=60)
        with closing(database):
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            queries = {name: f'SELECT count(*) FROM "{name}"' for name in names}
            queries["tasks completed"] = "SELECT count(*) FROM task_run WHERE state_type = 'COMPLETED'"
            queries["commits announced"] = "SELECT count(*) FROM events WHERE event = 'popalign.shard.committed'"
            queries["bytes"] = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            return {name: int(database.execute(query).fetchone()[0]) for name, query in queries.items()}

    def server_cpu(self) -> float:
        """Seconds."""
        assert self.server is not None
        server = psutil.Process(self.server.pid)
        return sum(sum(process.cpu_times()[:2]) for process in (server, *server.children(recursive=True)))

    def watched(self, work: Callable[[], Measured]) -> tuple[Measured, dict[str, Any]]:
        """Also what the server made of it, once nothing more arrives."""
        before, used = self.rows(), self.server_cpu()
        measured = work()
        cpu, now, last = self.server_cpu() - used, self.rows(), time.monotonic()
        while time.monotonic() < last + QUIET_SECONDS:
            time.sleep(0.5)
            sooner, now = now, self.rows()
            if now["events"] != sooner["events"] or now["task_run_state"] != sooner["task_run_state"]:
                last = time.monotonic()
        more = {name: count - before[name] for name, count in now.items() if count != before[name]}
        late = {"cpu_s_at_end": cpu, "cpu_s": self.server_cpu() - used, "late_s": last - measured.end}
        return measured, {"more": more, **late}


def wait_for(what: str, happened: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not come within {seconds:.0f} s")
