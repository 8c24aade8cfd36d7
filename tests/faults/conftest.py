"""The server and workers of the tests that kill them."""

import shutil
import subprocess
import sys
from collections.abc import Generator

import pytest
from killable import ROOT, SOURCES, Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    (folder / "checkout").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, folder / "checkout" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    running = Stack(folder)
    try:
        running.launch_server()
        command = [sys.executable, "-m", "flows.services_cli", "setup", "workers"]
        subprocess.run(command, env=running.environment(), cwd=folder / "checkout", check=True, timeout=300)
        running.launch_worker("cpu", "popalign-cpu", 4)
        running.new_gpu_workers()
        yield running
    finally:
        running.stop()
