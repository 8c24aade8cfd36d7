"""Results of benchmarks as rows of `benchmarks`, and the table that docs/performance.md shows of them.

`python -m tasks.benchmarks WORKSPACE FILE` writes that table into a file, between its two marks; rows of what was not
measured again, or on another device, stay.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from popalign_core.errors import InvalidInput
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import read_rows, write_rows

WORKSPACE_VARIABLE = "POPALIGN_BENCH_WORKSPACE"
BEGIN, END = "<!-- table of benchmarks -->", "<!-- end of the table -->"
LIBRARIES = ("torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy", "prefect", "duckdb", "pyarrow")
ROOT = Path(__file__).resolve().parents[1]


def record_benchmark(
    name: str,
    ours: Sequence[float],
    unit: str,
    *,
    peer: Sequence[float] = (),
    peer_name: str = "",
    device: str = "cpu",
    settings: Mapping[str, Any] | None = None,
) -> float | None:
    """Commits one result to the workspace of benchmarks, and tells it on the terminal; returns the ratio.

    name: letters, digits, '.', '_' and '-'. ours, peer: one value a repetition, each of ours beside one of the peer's;
    in a unit that ends in /s more is better, in any other less. device: as torch names it. settings: sizes and whatever
    else the numbers depend on. The workspace: what POPALIGN_BENCH_WORKSPACE names, else ./bench-workspace.
    Raises: InvalidInput where repetitions do not match.
    """
    if not ours or (peer and len(peer) != len(ours)):
        raise InvalidInput(f"{name}: {len(ours)} values of ours and {len(peer)} of the peer; one of each a repetition.")
    pairs = zip(ours, peer, strict=bool(peer))
    ratios = [own / other if unit.endswith("/s") else other / own for own, other in pairs]
    compared = ratios or list(ours)
    now = datetime.now(UTC)
    row: dict[str, Any] = {
        "run_id": _run_id(),
        "name": name,
        "unit": unit,
        "ours": median(ours),
        "peer": median(peer) if peer else None,
        "peer_name": peer_name or None,
        "ratio": median(ratios) if ratios else None,
        "repetitions": len(ours),
        "spread": (max(compared) - min(compared)) / median(compared) if median(compared) else 0.0,
        **_machine(device),
        "settings_json": json.dumps({} if settings is None else dict(settings), sort_keys=True, default=str),
        "measured_at": now.isoformat(timespec="seconds"),
    }
    place = Workspace.open(os.environ.get(WORKSPACE_VARIABLE) or "bench-workspace")
    with staged_artifact(
        ArtifactRef(str(place.root), row["run_id"], "benchmarks", f"{name}-{now:%H%M%S.%f}")
    ) as folder:
        write_rows(folder, "benchmarks", [row])
    sys.stdout.write(f"\n{_line(row)}\n")
    return row["ratio"]


def performance_table(rows: Iterable[Mapping[str, Any]], before: str = "") -> str:
    """A table in Markdown: of every name and device what was measured last. before: a table, whose other rows stay."""
    lines = {(cells[0], cells[6]): line for line in before.splitlines() if (cells := _cells(line))}
    for row in sorted(rows, key=lambda row: row["measured_at"]):
        line = _table_line(row)
        lines[row["name"], _cells(line)[6]] = line
    head = ["| what | popalign | peer | ratio | n | spread | device | measured |", "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*head, *(line for _, line in sorted(lines.items()))]) + "\n"


def _cells(line: str) -> list[str]:
    """Of a row of numbers of the table; none of any other line."""
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return cells if len(cells) == 8 and cells[4].isdigit() else []


def _table_line(row: Mapping[str, Any]) -> str:
    peer = "" if row["peer"] is None else f"{row['peer']:.4g} ({row['peer_name'] or 'peer'})"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
    device = f"{row['device']}, driver {row['driver']}" if row["driver"] else row["device"]
    cells = (
        row["name"],
        f"{row['ours']:.4g} {row['unit']}",
        peer,
        ratio,
        row["repetitions"],
        f"{100 * row['spread']:.0f}%",
        device,
        f"{row['measured_at'][:10]}, {row['commit']}",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def write_performance_table(workspace: str, path: Path) -> None:
    """Renews what stands between the two marks of a file. Raises: InvalidInput where it lacks them."""
    place = Workspace.open(workspace)
    rows = [row for run_id in place.run_ids() for row in read_rows(place, run_id, "benchmarks")]
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise InvalidInput(f"{path} lacks the lines {BEGIN} and {END}, between which the table goes.")
    path.write_text(f"{before}{BEGIN}\n\n{performance_table(rows, old)}\n{END}{after}", encoding="utf-8")


def _line(row: Mapping[str, Any]) -> str:
    text = f"{row['name']}: {row['ours']:.4g} {row['unit']}"
    if row["ratio"] is not None:
        text += f", {row['ratio']:.3g} times as good as {row['peer_name'] or 'the peer'} ({row['peer']:.4g})"
    return f"{text}, n = {row['repetitions']}, spread {100 * row['spread']:.0f}%, {row['device']}"


@cache
def _run_id() -> str:
    """One run for all that a process measures."""
    return f"bench-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"


@cache
def _machine(device: str) -> dict[str, str]:
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    is_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if is_gpu else f"{_processor()}, {len(os.sched_getaffinity(0))} cores"
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines() if is_gpu else []
    commit = _said("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    edited = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {
        "device": name,
        "driver": driver[0] if driver else "",
        "versions_json": json.dumps(versions),
        "commit": commit + ("+" if edited else ""),
    }


def _processor() -> str:
    """The model's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _said(*command: str) -> str:
    """What a command writes; nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    write_performance_table(sys.argv[1], Path(sys.argv[2]))
