"""What the storage tests share: a workspace, references into it, and rows for any table."""

import subprocess
import sys
from pathlib import Path

import pytest

from storage.artifacts import ArtifactRef
from storage.layout import Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace.open(tmp_path / "workspace")


@pytest.fixture
def ref(workspace: Workspace) -> ArtifactRef:
    return ArtifactRef(str(workspace.root), "night-1", "timings", "shard-0")


@pytest.fixture
def child():
    """Starts Python code in a process of its own, in the repository root; it is gone after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def timing():
    """A row of the table `timings`."""

    def row(key: str = "piece", seconds: float = 1.5) -> dict[str, object]:
        named = {"run_id": "night-1", "stage": "sampling", "key": key}
        return named | {"seconds": seconds, "items": 3, "device": "cpu"}

    return row
