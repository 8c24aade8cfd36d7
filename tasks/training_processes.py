"""Training in several processes: starts them, shows how far they are, and ends them with this one.

    align_round -> tasks.training_launcher (torch's elastic agent) -> tasks.training_rank, one a process

Every process holds one end of a pipe as its standard input, and ends when the other end, which this process holds, is
closed: by the system, should this process be killed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from popalign_core.errors import InvalidInput
from tasks.training_errors import read_failure

ORDER, PLAN, STEPS, LOG = "order.json", "plan.json", "steps.jsonl", "log"
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_END = 20.0
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class TrainingProcesses:
    """How many processes train together, and where they meet. Not part of a run's identity.

    per_host: processes on every host, one a GPU. hosts: each makes the same call on the same workspace. rendezvous:
    "host:port", the address of one of the hosts and a free port there; whoever reaches it can join, so it belongs in
    a network of your own. Empty: this host alone.
    Raises: InvalidInput.
    """

    per_host: int = 1
    hosts: int = 1
    rendezvous: str = ""

    def __post_init__(self) -> None:
        if self.per_host < 1 or self.hosts < 1:
            raise InvalidInput(f"got {self.per_host} processes on {self.hosts} hosts, expected one or more of each.")
        if self.hosts > 1 and not self.rendezvous:
            raise InvalidInput(f"training on {self.hosts} hosts needs a rendezvous: host:port of one of them.")
        if self.rendezvous and not self.rendezvous.rpartition(":")[2].isdigit():
            raise InvalidInput(f"rendezvous is {self.rendezvous!r}, expected host:port.")

    @property
    def world(self) -> int:
        """All processes together."""
        return self.per_host * self.hosts


ONE = TrainingProcesses()


@dataclass(frozen=True)
class Report:
    """Where a training says how far it is. advance: finished steps since the last call; say: one line."""

    advance: Callable[[int], None]
    say: Callable[[str], None]


def run_processes(module: str, order: str, name: str, processes: TrainingProcesses, report: Report) -> None:
    """Runs `python -m module <folder>` in every process of this host, the order in the folder's order.json.

    name: the same on all hosts, by which they know each other.
    Raises: what a process raised; LostProcess where one was killed or a host did not come.
    """
    with tempfile.TemporaryDirectory(prefix="popalign-training-") as name_of_folder:
        folder = Path(name_of_folder)
        (folder / ORDER).write_text(order)
        (folder / PLAN).write_text(json.dumps({"module": module, "name": name, **asdict(processes)}))
        with (folder / LOG).open("wb") as log:
            command = [sys.executable, "-P", "-m", "tasks.training_launcher", str(folder)]
            launcher = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(processes)
            )
        try:
            _watch(launcher, folder / STEPS, report)
        finally:
            _end(launcher)
        if launcher.returncode != 0:
            raise read_failure(folder, launcher.returncode, (folder / LOG).read_text(errors="replace"))


def end_with_parent(end: Callable[[], None]) -> None:
    """Calls `end` once the process that holds the other end of standard input is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        end()

    Thread(target=wait, daemon=True).start()


class StepFile:
    """What a process of a training reports, for `run_processes` to read."""

    def __init__(self, folder: Path):
        self._path = folder / STEPS

    def report(self) -> Report:
        """As the training wants it."""
        return Report(lambda count: self._write({"advance": count}), lambda text: self._write({"say": text}))

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def _environment(processes: TrainingProcesses) -> dict[str, str]:
    """For the launcher and what it starts: our packages first, threads shared out, nothing beyond this host."""
    # Accelerate would take its own settings from the environment; a training's are those of the run.
    values = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    paths = (str(ROOT), values.get("PYTHONPATH", ""))
    values["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    values.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes.per_host)))
    # Else the agent opens one more store, on all interfaces.
    values["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if processes.hosts == 1 or processes.rendezvous.startswith("127."):
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        values |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    return values


def _watch(launcher: "subprocess.Popen[bytes]", steps: Path, report: Report) -> None:
    """Passes on what is reported until the launcher ends."""
    read = 0
    while True:
        ended = launcher.poll() is not None
        if steps.exists():
            lines = steps.read_bytes()
            whole = lines[read : lines.rfind(b"\n") + 1]
            read += len(whole)
            for line in whole.splitlines():
                _pass_on(json.loads(line), report)
        if ended:
            return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _pass_on(line: dict[str, Any], report: Report) -> None:
    if "say" in line:
        report.say(line["say"])
    report.advance(line.get("advance", 0))


def _end(launcher: "subprocess.Popen[bytes]") -> None:
    """Whatever happened, no process is left."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    try:
        launcher.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
