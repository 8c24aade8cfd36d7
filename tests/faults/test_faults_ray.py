"""One run on a Ray cluster of two nodes, of which one loses a process and then dies: the artifacts are the same.

Both nodes are on this machine. Each says that it has a GPU, of which a shard takes a half.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from killable import ROOT, SOURCES, wait_for

from storage.artifacts import artifact_digest, committed_keys, verify
from storage.layout import STAGING, Workspace
from storage.schemas import FOLDER, TABLES

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
pytest.importorskip("ray", reason="pip install 'popalign[ray]'")

RUN = "r"
OWN_TO_A_RUN = {"starts", "timings"}
VALIDATION_IMAGES = 32
SETTINGS = (
    "device=cpu expansion.axes=perceived_gender expansion.max_subjects=2 sampling.steps=6 sampling.batch_size=4 "
    "sampling.shard_size=4 images.train_neutral=16 images.validation=16 images.evaluation=4 images.trained=1 "
    "images.obedience=1 populations.weighting=even alignment.rounds=1 alignment.steps=2 alignment.pairs_per_step=2 "
    "assessment.resamples=200"
).split()
# The head has room for one shard, by its CPU; the other node for two, which share its GPU.
NODES = """
import json, sys
from ray.cluster_utils import Cluster
common = {"num_gpus": 1, "object_store_memory": 100_000_000, "node_ip_address": "127.0.0.1"}
cluster = Cluster(initialize_head=True, head_node_args={**common, "num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(**common, num_cpus=2)
raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, other)]
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass
class Nodes:
    """Two raylets, and what their processes were seen at: process id -> claims that it held."""

    folder: Path
    address: str
    head: psutil.Process
    other: psutil.Process
    seen: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    commands: set[str] = field(default_factory=set)
    over: threading.Event = field(default_factory=threading.Event)
    runs: list[subprocess.Popen[str]] = field(default_factory=list)

    def at_work(self, raylet: psutil.Process) -> dict[int, str]:
        """Process id -> the artifact that it has claimed, of a node's processes."""
        found: dict[int, str] = {}
        for process in children(raylet):
            with suppress(psutil.Error):
                claims = [Path(file.path).stem for file in process.open_files() if file.path.endswith(".claim")]
                if claims:
                    found[process.pid] = claims[0]
                    self.seen[process.pid].add(claims[0])
        return found

    def watch(self) -> None:
        while not self.over.wait(0.2):
            self.at_work(self.head)
            for process in children(self.head):
                with suppress(psutil.Error):
                    self.commands.add(" ".join(process.cmdline()))


def children(raylet: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return raylet.children(recursive=True)
    return []


def environment(folder: Path) -> dict[str, str]:
    """Everything on the loopback, reported to nobody, and only for those who have the token."""
    return {
        **os.environ,
        "PYTHONPATH": str(folder / "checkout"),
        "PREFECT_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def nodes() -> Generator[Nodes]:
    # Not pytest's folder: the path of a socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="popalign-ray-", dir="/tmp"))
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "checkout").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "checkout" / name)
    with (folder / "nodes.log").open("wb") as log:
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", NODES]
        cluster = subprocess.Popen(command, env=environment(folder), cwd=folder, stdin=pipe, stdout=pipe, stderr=log)
    try:
        assert cluster.stdout is not None
        line = cluster.stdout.readline()
        assert line, (folder / "nodes.log").read_text()
        started = json.loads(line)
        running = Nodes(folder, started["address"], *map(psutil.Process, started["raylets"]))
        try:
            yield running
        finally:
            running.over.set()
            for run in running.runs:
                end(run)
    finally:
        end(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen[Any]) -> None:
    """Kills a process with all that it started, unless it has ended by itself."""
    if process.poll() is None:
        for victim in (*psutil.Process(process.pid).children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
    process.communicate()


def start(nodes: Nodes, root: Path, *more: str) -> subprocess.Popen[str]:
    settings = [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]
    code = "import sys; from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", "emoji", "--run-id", RUN, "-w", str(root), *settings]
    with root.with_suffix(".log").open("w") as log:
        run = subprocess.Popen(
            command, env=environment(nodes.folder), cwd=nodes.folder / "checkout", stdout=log, stderr=log, text=True
        )
    nodes.runs.append(run)
    return run


def digests(root: Path) -> dict[str, str]:
    tables = [table for table in TABLES if table not in FOLDER and table not in OWN_TO_A_RUN]
    refs = [ref for table in tables for ref in committed_keys(Workspace(root), RUN, table)]
    for ref in refs:
        verify(ref)
    return {f"{ref.table}/{ref.key}": artifact_digest(ref) for ref in refs}


def stopped_at_work(nodes: Nodes, root: Path, table: str, count: int) -> list[int]:
    """Processes of the other node, stopped while so many are at artifacts of a table, none of them committed."""

    def unfinished(claim: str) -> bool:
        name, key = claim.split(".", 1)
        return name == table and not (root / "runs" / RUN / table / key / "manifest.json").exists()

    found: list[int] = []

    def caught() -> bool:
        stopped: list[psutil.Process] = []
        for pid in nodes.at_work(nodes.other):
            with suppress(psutil.NoSuchProcess):
                stopped.append(psutil.Process(pid))
                stopped[-1].suspend()
        # Again, now that nothing moves.
        found[:] = [pid for pid, claim in nodes.at_work(nodes.other).items() if unfinished(claim)]
        if len(found) >= count and set(found) <= {process.pid for process in stopped}:
            return True
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        return False

    wait_for(f"{count} processes of the other node at {table}", caught, 300)
    return found


def test_a_process_and_then_a_node_die_and_the_artifacts_are_the_same(nodes: Nodes, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    undisturbed = start(nodes, alone)
    place = (f"execution.ray_address={nodes.address}", "execution.placement=ray", "execution.gpus_per_shard=0.5")
    threading.Thread(target=nodes.watch, daemon=True).start()
    run = start(nodes, shared, *place)

    # Two shards share the GPU of one node; one of the two processes dies.
    first, second = stopped_at_work(nodes, shared, "samples", 2)
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGCONT)
    # The node dies with all its processes, one of which is at a shard.
    stopped_at_work(nodes, shared, "attributes", 1)
    victims = [nodes.other, *children(nodes.other)]
    for victim in victims:
        victim.kill()

    assert run.wait(400) == 0, shared.with_suffix(".log").read_text()
    nodes.over.set()
    assert undisturbed.wait(400) == 0, alone.with_suffix(".log").read_text()
    assert digests(shared) == digests(alone)
    assert not [path for path in (shared / "runs" / RUN / STAGING).iterdir() if "~" in path.name]
    # Finished shards count, also those that a process died of.
    assert f"{VALIDATION_IMAGES}/{VALIDATION_IMAGES}" in shared.with_suffix(".log").read_text()
    # A process makes many shards. Training, for which the cluster's processes end, comes once.
    dead = {victim.pid for victim in victims} | {first}
    by_head = {pid: claims for pid, claims in nodes.seen.items() if pid not in dead}
    assert len(by_head) == 2
    assert max(map(len, by_head.values())) >= 3
    # None starts a server of Prefect for itself: they use the one of the process that started the run.
    assert not [command for command in nodes.commands if "uvicorn" in command]
