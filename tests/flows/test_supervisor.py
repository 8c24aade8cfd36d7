"""`popalign up` with the real server and workers: what it starts, that what dies comes back, and that nothing stays."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Failed, Scheduled
from prefect.types._datetime import now

from flows.machine import visible_gpus, worker_devices
from flows.services import Service, healthy, identify, read_record, services_folder, services_status
from flows.stopping import marked, role
from popalign_core.errors import InvalidInput
from tasks.events import DRIFTED

ROOT = Path(__file__).parents[2]
DECLARATION = """\
name: tiny
deployments:
  - name: nightly
    entrypoint: flows/tiny.py:tiny
    tags: [popalign]
    work_pool: {name: popalign-cpu}
    schedules: [{cron: "30 2 * * *", timezone: Europe/Berlin, slug: nightly}]
  - name: gpu
    entrypoint: flows/tiny.py:tiny
    tags: [popalign]
    work_pool: {name: popalign-gpu}
"""
FLOW = """\
import os
import time

from prefect import flow

@flow(name="tiny", persist_result=True)
def tiny(seconds: float = 0.0) -> dict[str, str]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)
    names = ("POPALIGN_WORKSPACE", "CUDA_VISIBLE_DEVICES", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY")
    return {name: os.environ[name] for name in names}
"""
pytestmark = pytest.mark.timeout(300)


@dataclass
class Machine:
    """Where `popalign up` runs in these tests. told: what came to the webhook, subject and body."""

    home: Path
    project: Path
    workspace: Path
    port: int
    told: list[dict[str, str]] = field(default_factory=list)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Calls a command of the services to its end."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, cwd=ROOT, check=False)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "flows.services_cli", *arguments]

    def up(self, *arguments: str) -> list[str]:
        where = ("--workspace", str(self.workspace), "--project", str(self.project), "--port", str(self.port))
        return self.command("up", *where, *arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s: {what}"
        time.sleep(0.2)
    return found


def service(name: str) -> Service | None:
    record = read_record()
    return next((found for found in record.services if found.name.startswith(name)), None) if record else None


def killed(name: str) -> Service:
    """Kills a service. Returns: the one that was started in its place."""
    old = service(name)
    assert old is not None
    os.kill(old.pid, signal.SIGKILL)
    return wait_for(
        lambda: (new := service(name)) is not None and new.pid != old.pid and new.alive() and new, f"{name} comes back"
    )


@contextmanager
def webhook(told: list[dict[str, str]]) -> Iterator[str]:
    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Generator[Machine]:
    root = tmp_path_factory.mktemp("machine")
    project = root / "project"
    (project / "flows").mkdir(parents=True)
    (project / "flows" / "tiny.py").write_text(FLOW)
    (project / "prefect.yaml").write_text(DECLARATION)
    here = Machine(root / "home", project, root / "workspace", free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(here.home))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        # By this setting PostgreSQL is chosen; here it names another SQLite file.
        patch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{root}/secret-name.db")
        yield here
        subprocess.run(here.command("down"), cwd=ROOT, check=True)
        assert not marked()


@pytest.fixture(scope="module")
def running(machine: Machine) -> Generator[Machine]:
    log = machine.home.parent / "terminal.log"
    with log.open("wb") as output:
        # From a shell that makes what it starts deaf to SIGINT, which workers send themselves when they are to end.
        script = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *machine.up("--gpu-workers", "1")]
        process = subprocess.Popen(script, cwd=ROOT, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        record = read_record()
        return record is not None and record.ready

    wait_for(ready, "all is up", 180)
    yield machine
    # Does nothing where a test has stopped it.
    process.terminate()
    assert process.wait(60) == 0, log.read_text()


@pytest.fixture(scope="module")
def client(running: Machine) -> Generator[SyncPrefectClient]:
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{running.port}/api"}),
        get_client(sync_client=True) as client,
    ):
        yield client


def run(client: SyncPrefectClient, deployment: str, seconds: float, state: StateType) -> UUID:
    """Starts a run and waits until its state is as given."""
    found = client.read_deployment_by_name(f"tiny/{deployment}")
    run_id = client.create_flow_run_from_deployment(found.id, parameters={"seconds": seconds}).id

    def reached() -> bool:
        now_in = client.read_flow_run(run_id).state
        assert now_in is not None
        assert now_in.type == state or not now_in.is_final(), now_in
        return now_in.type == state

    wait_for(reached, f"a run of {deployment} is {state.value}")
    return run_id


@pytest.mark.stack
def test_what_runs_listens_on_this_machine_only_and_holds_no_password(running: Machine):
    rows = services_status()
    assert [row.what.split("-")[0] for row in rows] == ["popalign up", "server", "cpu", "gpu0"]
    assert {row.state for row in rows} == {"running"}
    processes = marked()
    assert sorted(role(process) for process in processes) == ["server", "worker", "worker"]
    sockets = [found for process in processes for found in process.net_connections()]
    addresses = [found.laddr for found in sockets if found.status == psutil.CONN_LISTEN]
    assert running.port in [address.port for address in addresses]
    assert {address.ip for address in addresses} == {"127.0.0.1"}

    texts = [" ".join(process.cmdline()) for process in [psutil.Process(int(rows[0].pid)), *processes]]
    texts += [path.read_text() for path in services_folder().iterdir()]
    texts += [json.dumps(process.environ()) for process in processes if role(process) == "worker"]
    assert len(texts) > len(processes)
    assert not [text for text in texts if "secret-name" in text]
    assert (running.home.parent / "secret-name.db").exists()


@pytest.mark.stack
def test_a_second_up_says_what_runs(running: Machine):
    pids = {process.pid for process in marked()}
    again = running.call("up", "--workspace", str(running.workspace))
    assert again.returncode == 0, again.stderr
    assert f"already up: http://127.0.0.1:{running.port}" in again.stdout
    assert str(services_folder()) in again.stdout
    assert all(str(pid) in again.stdout for pid in pids)
    other = running.call("up", "--workspace", str(running.workspace / "other"))
    assert other.returncode == 1
    assert f"popalign is up already, with workspace {running.workspace}" in other.stderr
    assert {process.pid for process in marked()} == pids


@pytest.mark.stack
def test_the_schedule_yields_runs(client: SyncPrefectClient):
    """With a wrong sqlalchemy, all looks well and no run ever comes."""
    found = client.read_deployment_by_name("tiny/nightly")

    def scheduled() -> list[Any]:
        runs = client.read_flow_runs()
        return [run for run in runs if run.deployment_id == found.id and run.auto_scheduled]

    runs = wait_for(scheduled, "the schedule yields runs")
    assert {run.state.type for run in runs} == {StateType.SCHEDULED}
    assert {run.expected_start_time.minute for run in runs} == {30}


@pytest.mark.stack
def test_failures_and_drift_are_told(running: Machine, client: SyncPrefectClient):
    url = f"http://127.0.0.1:{running.port}/api"
    with webhook(running.told) as address:
        template = {"subject": "{{subject}}", "body": "{{body}}"}
        CustomWebhookNotificationBlock(name="ops", url=address, json_data=template).save("ops")
        done = running.call(
            "setup", "process", "--api-url", url, "--notify", "custom-webhook/ops", "--project", str(running.project)
        )
        assert done.returncode == 0, done.stderr
        time.sleep(2)  # the server reads its automations anew
        later = Scheduled(scheduled_time=now() + timedelta(days=1))
        ends = {
            "gpu": Failed(message="a piece of a run, of which the run tells"),
            "nightly": Failed(name="Held", message="disparity fell too little"),
        }
        for deployment, end in ends.items():
            found = client.read_deployment_by_name(f"tiny/{deployment}")
            run_id = client.create_flow_run_from_deployment(found.id, state=later, name=f"{deployment} run").id
            client.set_flow_run_state(run_id, end, force=True)
        payload = {
            "axis": "skin tone", "run_id": "night-2", "compared_with": "night-1", "tolerance": 0.01,
            "now": {"value": 0.25}, "before": {"value": 0.125},
        }  # fmt: skip
        emit_event(DRIFTED, {"prefect.resource.id": "popalign.run.night-2.drift.skin-tone"}, payload=payload)
        wait_for(lambda: len(running.told) >= 2, "two notices")
        time.sleep(2)  # for one too many
    held, drift = sorted(running.told, key=lambda told: "drifted" in told["subject"])
    assert held["subject"] == "popalign: nightly run Held"
    assert held["body"].splitlines()[:2] == ["nightly run (tiny/nightly) Held", "disparity fell too little"]
    assert held["body"].splitlines()[2].startswith(f"http://127.0.0.1:{running.port}/runs/flow-run/")
    assert drift["subject"] == "popalign: skin tone disparity drifted"
    assert "0.125" in drift["body"]
    assert len(running.told) == 2


@pytest.mark.stack
def test_what_is_killed_comes_back_and_works(running: Machine, client: SyncPrefectClient):
    killed("server")
    wait_for(lambda: healthy(running.port), "the server answers on its port again")
    killed("cpu")
    run_id = run(client, "nightly", 0, StateType.COMPLETED)
    seen = client.read_flow_run(run_id).state.result()
    assert seen == {
        "POPALIGN_WORKSPACE": str(running.workspace),
        "CUDA_VISIBLE_DEVICES": "",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }
    on_gpu = run(client, "gpu", 200, StateType.RUNNING)
    killed("gpu")
    state = client.read_flow_run(on_gpu).state
    assert state is not None
    # Not left to share the GPU with the next one.
    assert (state.type, "run" in [role(process) for process in marked()]) == (StateType.CRASHED, False)


@pytest.mark.stack
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("running")
def test_a_worker_that_hangs_is_started_again():
    old = service("cpu")
    assert old is not None
    # At once: most likely before the server has heard of it, which takes the longer time to notice.
    os.kill(old.pid, signal.SIGSTOP)
    wait_for(lambda: (new := service("cpu")) is not None and new.pid != old.pid and new.alive(), "it comes back", 500)


@pytest.mark.stack
def test_down_ends_all_and_a_killed_up_leaves_nothing(running: Machine, client: SyncPrefectClient):
    run_id = run(client, "nightly", 200, StateType.RUNNING)
    began = time.monotonic()
    down = running.call("down")
    assert (down.returncode, down.stdout.count("process ")) == (0, 5), down
    assert time.monotonic() - began < 45
    assert (marked(), services_status(), healthy(running.port)) == ([], [], False)
    assert running.call("down").stdout == "nothing was running\n"

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", running.port))
        taken.listen()
        refused = subprocess.run(running.up("--detach"), capture_output=True, text=True, cwd=ROOT, check=False)
    assert f"port {running.port} of 127.0.0.1 cannot be used" in refused.stderr
    assert not marked()

    detached = subprocess.run(running.up("--detach"), capture_output=True, text=True, cwd=ROOT, check=False)
    assert detached.returncode == 0, detached
    assert f"http://127.0.0.1:{running.port} (stop with" in detached.stdout
    state = client.read_flow_run(run_id).state
    assert state is not None
    assert (state.type, "Retry this run" in (state.message or "")) == (StateType.CRASHED, True)

    record = read_record()
    assert record is not None
    os.kill(record.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: {row.state for row in services_status()} == {"gone"}, "the children of a killed `up` end", 40)
    assert not marked()


@pytest.mark.parametrize(
    ("found", "wanted", "each", "devices"),
    [
        (["0", "1"], None, 1, ("0", "1")),
        (["GPU-5a", "GPU-7b"], 1, 1, ("GPU-5a",)),
        ([], None, 1, ()),
        ([], None, 8, ()),
        ([], 2, 1, ("0", "1")),
        (["0"], 0, 1, ()),
        (["0", "1", "2", "3", "4"], None, 2, ("0,1", "2,3")),
        (["3", "1"], 1, 2, ("3,1",)),
        ([], 2, 2, ("0,1", "2,3")),
    ],
)
def test_every_gpu_worker_has_gpus_of_its_own(
    found: list[str], wanted: int | None, each: int, devices: tuple[str, ...]
):
    assert worker_devices(found, wanted, each) == devices


@pytest.mark.parametrize(
    ("wanted", "each", "asked"),
    [(3, 1, "--gpu-workers 3"), (2, 2, "--gpu-workers 2 --gpus-per-worker 2"), (None, 4, "--gpus-per-worker 4")],
)
def test_more_than_there_are_is_refused(wanted: int | None, each: int, asked: str):
    with pytest.raises(InvalidInput, match=f"{asked}: there are 2 GPUs here"):
        worker_devices(["0", "1"], wanted, each)


def test_gpus_are_those_named_by_the_environment_else_by_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for value, expected in (("2,3", ["2", "3"]), ("", []), ("-1", []), ("GPU-5a", ["GPU-5a"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-1)\n  MIG 1g\nGPU 1: H100 (UUID: GPU-2)'\n")
    driver.chmod(0o755)
    assert visible_gpus() == ["0", "1"]


def test_a_later_process_of_the_same_number_is_another_one():
    me = identify("test", os.getpid())
    assert me.alive()
    assert not me.model_copy(update={"started": me.started - 60}).alive()
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not me.model_copy(update={"pid": gone.pid}).alive()
