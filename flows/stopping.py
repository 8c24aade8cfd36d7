"""Ends what `popalign up` started, in order and completely, whoever was killed before.

Every process started by it, and what that starts, bears a mark in its environment: a run whose worker died is found.
"""

import json
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any, Literal
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from flows.services import Service, held, read_record, remove_record, services_folder

MARK = "POPALIGN_SERVICES"
SERVICE = "POPALIGN_SERVICE"
WORKER_SECONDS, RUN_SECONDS, SERVER_SECONDS = 10.0, 25.0, 10.0
SUPERVISOR_SECONDS = WORKER_SECONDS + RUN_SECONDS + SERVER_SECONDS + 15.0
POLL_SECONDS = 0.2
ANSWER_SECONDS = 5.0
UNFINISHED = ("PENDING", "RUNNING", "CANCELLING")
Role = Literal["server", "worker", "run"]


def marked() -> list[psutil.Process]:
    """Processes that services of this folder are or have started."""
    wanted, found = str(services_folder()), list[psutil.Process]()
    for process in psutil.process_iter():
        if _environment(process).get(MARK) == wanted and _lives(process):
            found.append(process)
    return found


def role(process: psutil.Process) -> Role:
    """What a marked process is."""
    with suppress(psutil.Error):
        command = process.cmdline()
        if "start" in command and "server" in command:
            return "server"
        if "start" in command and "worker" in command:
            return "worker"
    return "run"


def stop_marked(why: str, hurry: Callable[[], bool] = lambda: False) -> list[int]:
    """Ends workers, then what they run, then the server; kills what stays.

    why: said on the pages of runs that are ended. hurry: asked again and again; True = kill now.
    Returns: ids of the processes that were ended.
    """

    def processes(which: Role) -> list[psutil.Process]:
        return [process for process in marked() if role(process) == which]

    # Asked first: a worker that ends takes its runs along, and says nothing to the server.
    runs = _flow_runs(processes("run"))
    ended = _end(lambda: processes("worker"), WORKER_SECONDS, hurry)
    ended += _end(lambda: processes("run"), RUN_SECONDS, hurry)
    _mark_crashed(runs, why)
    return ended + _end(lambda: processes("server"), SERVER_SECONDS, hurry)


def stop_orphans(service: str) -> int:
    """Ends what a worker that is gone had started. Returns: how many processes."""

    def orphans() -> list[psutil.Process]:
        return [found for found in marked() if _environment(found).get(SERVICE) == service and role(found) == "run"]

    runs = _flow_runs(orphans())
    ended = _end(orphans, RUN_SECONDS)
    _mark_crashed(runs, f"its worker {service} died")
    return len(ended)


def take_down() -> list[str]:
    """Stops what `popalign up` started, even where that was killed. Returns: names of what was stopped."""
    record = read_record()
    names = {service.pid: service.name for service in record.services} if record else {}
    before = {process.pid: names.get(process.pid, role(process)) for process in marked()}
    if record is not None and held() and record.supervisor.alive():
        before[record.supervisor.pid] = record.supervisor.name
        _end_supervisor(record.supervisor)
    for pid in stop_marked("`popalign down`"):
        before.setdefault(pid, "run")
    remove_record()
    return [f"{name} (process {pid})" for pid, name in before.items()]


def _end_supervisor(supervisor: Service) -> None:
    """It stops everything by itself, and is killed if that takes too long."""
    deadline = time.monotonic() + SUPERVISOR_SECONDS
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(supervisor.pid)
        process.terminate()
        while supervisor.alive():
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(POLL_SECONDS)


def _end(
    processes: Callable[[], list[psutil.Process]], seconds: float, hurry: Callable[[], bool] = lambda: False
) -> list[int]:
    """Asks each process once to end, since a worker takes a second SIGTERM as a wish to be killed; then kills."""
    deadline, asked = time.monotonic() + seconds, set[psutil.Process]()
    # A process that is ending has lost its environment, and the mark with it, but still holds its port.
    while left := {*processes(), *filter(_lives, asked)}:
        kill = time.monotonic() > deadline or hurry()
        for process in left:
            if kill or process not in asked:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        asked |= left
        time.sleep(POLL_SECONDS)
    return [process.pid for process in asked]


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _environment(process: psutil.Process) -> dict[str, str]:
    # Processes of others, and those that end meanwhile, show none.
    with suppress(psutil.Error, OSError):
        return process.environ()
    return {}


def _flow_runs(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """Addresses of the server and ids of the flow runs that processes are of."""
    found = [_environment(process) for process in processes]
    return {(seen["PREFECT_API_URL"], seen["PREFECT__FLOW_RUN_ID"]) for seen in found if "PREFECT__FLOW_RUN_ID" in seen}


def _mark_crashed(runs: set[tuple[str, str]], why: str) -> None:
    """Tells the server of runs that were ended: a process that gets SIGTERM leaves that to its worker, which is gone.

    Where the server is gone too, it learns by the zombie automation.
    """
    message = f"the process was ended: {why}. Retry this run: it goes on after the last committed shard."
    for api_url, run in runs:
        address = f"{api_url}/flow_runs/{run}"
        with suppress(OSError, HTTPException, ValueError):
            if _ask(address)["state_type"] in UNFINISHED:
                state = {"type": "CRASHED", "name": "Crashed", "message": message}
                _ask(f"{address}/set_state", {"state": state, "force": True})


def _ask(address: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Prefect's client would take longer to load than all else here."""
    body = None if content is None else json.dumps(content).encode()
    request = Request(address, body, {"Content-Type": "application/json"})
    # Without proxies: they are for other hosts.
    with build_opener(ProxyHandler({})).open(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)
