"""Starts Prefect's server and the workers of this machine, starts again what dies, and ends all with itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from flows.machine import Plan, require_free
from flows.processes import Child, Say, children_of, common_environment
from flows.services import (
    HOST,
    Record,
    Service,
    healthy,
    holding_services,
    identify,
    remove_record,
    write_record,
)
from flows.stopping import marked, stop_marked
from flows.watchdog import Watchdog
from popalign_core.errors import PopalignError

HEALTHY_SECONDS = 240.0
POLL_SECONDS = 0.5


class ServiceDied(PopalignError):
    """A service ended before everything was up."""


def supervise(plan: Plan, say: Say) -> None:
    """Runs everything until a signal or Ctrl-C, then stops it.

    Raises: ServicesBusy if a `popalign up` runs, InvalidInput if the port is in use, ServiceDied if something does
    not start; nothing stays behind.
    """
    with holding_services():
        if left := marked():
            say(f"ending {len(left)} processes that an earlier `popalign up` left behind")
            stop_marked("`popalign up` was killed")
        require_free(plan.port)
        _listen()
        children = children_of(plan)
        try:
            _start(plan, children, say)
            _, *workers = children
            watchdog = Watchdog(plan.port, [worker.name for worker in workers])
            while True:
                time.sleep(POLL_SECONDS)
                silent = watchdog.silent()
                for child in children:
                    if child.name in silent:
                        child.kill_silent(say)
                if [child for child in children if child.revive(say)]:
                    _record(plan, children, ready=True)
        except KeyboardInterrupt:
            say("stopping workers, then the server")
        finally:
            _stop(say)


def _start(plan: Plan, children: list[Child], say: Say) -> None:
    began = time.monotonic()
    server, *workers = children
    server.start()
    _record(plan, [server], ready=False)
    while not healthy(plan.port):
        if death := server.death():
            raise ServiceDied(f"Prefect's server did not start ({death}):\n{_tail(server.log)}")
        if time.monotonic() - began > HEALTHY_SECONDS:
            raise ServiceDied(f"Prefect's server does not answer after {HEALTHY_SECONDS:.0f} s:\n{_tail(server.log)}")
        time.sleep(POLL_SECONDS)
    say(f"server: http://{HOST}:{plan.port} (process {server.pid}, {time.monotonic() - began:.0f} s)")
    for line in _set_up(plan):
        say(line)
    for worker in workers:
        worker.start()
        say(f"worker: {worker.name} (process {worker.pid})")
    # Said before it is recorded: `up --detach` shows what was said as soon as the record is there.
    say(f"up after {time.monotonic() - began:.0f} s: http://{HOST}:{plan.port} (stop with Ctrl-C or `popalign down`)")
    _record(plan, children, ready=True)


def _set_up(plan: Plan) -> list[str]:
    """Calls `popalign setup` in another process: what it loads would stay in this one."""
    command = [
        sys.executable,
        "-m",
        "flows.services_cli",
        "setup",
        plan.placement,
        "--only-changed",
        "--project",
        str(plan.project),
    ]
    command += ["--notify", plan.notify] if plan.notify else []
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[1],
        env=common_environment(plan),
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    if done.returncode:
        raise ServiceDied(f"the server was not set up: {done.stderr.strip()}")
    return done.stdout.splitlines()


def _record(plan: Plan, children: list[Child], ready: bool) -> None:
    # One that has just died is not worth a failure here: it is started again.
    services = list[Service]()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            services.append(identify(child.name, child.pid, child.log))
    write_record(
        Record(
            supervisor=identify("up", os.getpid()),
            port=plan.port,
            workspace=str(plan.workspace),
            placement=plan.placement,
            services=services,
            ready=ready,
        )
    )


def _stop(say: Say) -> None:
    again = threading.Event()

    def hurry(_number: int, _frame: FrameType | None) -> None:
        again.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hurry)
    began = time.monotonic()
    ended = stop_marked("`popalign up` was stopped", again.is_set)
    remove_record()
    say(f"stopped: {len(ended)} processes in {time.monotonic() - began:.1f} s")


def _listen() -> None:
    # A shell script starts what it sends to the background deaf to SIGINT, and so would be the workers, which turn
    # SIGTERM into SIGINT. nohup's deafness to SIGHUP is meant.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
