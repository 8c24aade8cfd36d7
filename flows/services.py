"""Which services of popalign run on this machine: a record of the server and the workers.

Record, lock and logs lie in PREFECT_HOME/popalign-services, since the server's database does, and not in the
workspace, which several hosts may share.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.request import ProxyHandler, build_opener

import psutil
from pydantic import BaseModel, ValidationError

from popalign_core.errors import PopalignError
from storage.disk import make_folder, write_in_one_step
from storage.locks import try_lock

HOST = "127.0.0.1"
RECORD = "services.json"
# Boot time, to which start times are relative, is corrected with the clock.
CLOCK_SECONDS = 2.0


class ServicesBusy(PopalignError):
    """Another `popalign up` has the services of this machine."""


class Service(BaseModel, frozen=True):
    """A process. started: seconds since 1970, which tells it from a later process of the same number."""

    name: str
    pid: int
    started: float
    log: str = ""

    def alive(self) -> bool:
        """Whether this very process runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < CLOCK_SECONDS
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


class Record(BaseModel, frozen=True):
    """What `popalign up` started. ready: the server has answered, and all workers were started."""

    supervisor: Service
    port: int
    workspace: str
    placement: str
    services: list[Service] = []
    ready: bool = False

    @property
    def url(self) -> str:
        """Address of the user interface."""
        return f"http://{HOST}:{self.port}"


class StatusRow(NamedTuple):
    """A line of `popalign status`."""

    what: str
    pid: str
    state: str
    detail: str


def services_folder() -> Path:
    """Where record, lock and logs lie: next to the database that Prefect uses by default."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser().absolute() / "popalign-services"


def identify(name: str, pid: int, log: Path | None = None) -> Service:
    """A process of this user that runs now."""
    return Service(name=name, pid=pid, started=psutil.Process(pid).create_time(), log=str(log or ""))


def read_record() -> Record | None:
    """The last record, or None; what it names may be gone."""
    try:
        return Record.model_validate_json((services_folder() / RECORD).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def write_record(record: Record) -> None:
    """Replaces the record."""
    write_in_one_step(services_folder() / RECORD, record.model_dump_json(indent=1).encode())


def remove_record() -> None:
    """After everything was stopped."""
    (services_folder() / RECORD).unlink(missing_ok=True)


@contextmanager
def holding_services() -> Generator[None]:
    """Holds this machine's services; the system lets go when the process ends. Raises: ServicesBusy."""
    make_folder(services_folder())
    with (services_folder() / "lock").open("a") as stream:
        if not try_lock(stream):
            raise ServicesBusy(
                "another `popalign up` is at work. Look at it with `popalign status`, or stop it with `popalign down`."
            )
        yield


def held() -> bool:
    """Whether a `popalign up` runs."""
    try:
        with (services_folder() / "lock").open("a") as stream:
            if not try_lock(stream):
                return True
            fcntl.flock(stream, fcntl.LOCK_UN)
    except FileNotFoundError:
        pass
    return False


def healthy(port: int, seconds: float = 2.0) -> bool:
    """Whether Prefect's server answers on a port of this machine."""
    try:
        # Without proxies: they are for other hosts.
        with build_opener(ProxyHandler({})).open(f"http://{HOST}:{port}/api/health", timeout=seconds) as answer:
            return answer.read() == b"true"
    except (OSError, HTTPException):
        return False


def services_status() -> list[StatusRow]:
    """What runs on this machine, for `popalign status`; empty where nothing was started, or all was stopped."""
    record = read_record()
    if record is None:
        return []
    up = held() and record.supervisor.alive()
    answers = healthy(record.port)
    rows = [
        StatusRow(
            "popalign up",
            str(record.supervisor.pid),
            "running" if up else "gone",
            f"workspace {record.workspace}, placement {record.placement}" if up else "clean up with `popalign down`",
        )
    ]
    for service in record.services:
        state, detail = ("running" if service.alive() else "gone"), service.log
        if service.name == "server":
            state = state if answers or state == "gone" else "running, does not answer"
            detail = f"{record.url}, log {service.log}"
        rows.append(StatusRow(service.name, str(service.pid), state, detail))
    return rows
