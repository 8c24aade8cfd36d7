"""Looks at a training's processes from outside, through /proc."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def training_pids(folder: Path) -> dict[int, str]:
    """Living launchers and ranks whose folder lies in the given one, and the rank of each ("" for a launcher)."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            variables = (entry / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "-m" in command and any(part.startswith(str(folder)) for part in command):
            values = dict(variable.partition("=")[::2] for variable in variables)
            found[int(entry.name)] = values.get("RANK", "")
    return found


def listening_addresses(pid: int) -> list[str]:
    """Addresses, as hexadecimal, that a process accepts TCP connections at."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def set_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder by which the processes of one test are known; each of them computes in one thread."""
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder
