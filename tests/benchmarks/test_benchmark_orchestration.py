"""Seconds that orchestration adds to a shard: a stage of 1,000 shards under a Prefect server against a bare loop.

The peer draws and commits the same shards without Prefect, claims and timings. Shards sleep for real, though not for
10 s: what a shard costs beside its sleep is measured, and set against 10 s. The first and the last hundred tell whether
that grows with the number of shards. A server of its own receives everything; its database is looked at afterwards.
POPALIGN_BENCH_SHARDS (1000), POPALIGN_BENCH_IMAGES a shard (10; their product must be a multiple of 100).
POPALIGN_BENCH_SECONDS of sleep a shard (0.02; peers sleep no longer, workers 0.2 or more).
POPALIGN_BENCH_FORMS: which of stage, dispatched, claims (all). POPALIGN_BENCH_JSON: a file for the numbers.
"""

import json
import os
import socket
import sys
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import prefect
import pytest
from orchestration_bench import CPU, WALL, Bench, Measured, beyond

pytestmark = pytest.mark.timeout(4 * 3600)

SHARDS = int(os.environ.get("POPALIGN_BENCH_SHARDS", "1000"))
SECONDS = float(os.environ.get("POPALIGN_BENCH_SECONDS", "0.02"))
FORMS = os.environ.get("POPALIGN_BENCH_FORMS", "stage,dispatched,claims").split(",")
PROCESSES = 2
# Shorter shards of two workers would keep the server busy all the time, and wait for it, as those of 10 s do not.
DISPATCHED_SECONDS = max(SECONDS, 0.2)
MOST_PERCENT = 2.0
MOST_GROWTH = 1.5
MOST_CPU_SECONDS_OF_CLAIMS = 0.01


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Generator[Bench]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    made = Bench(tmp_path_factory.mktemp("orchestration"), port)
    with made.serving():
        yield made


@pytest.fixture(scope="module")
def numbers() -> Generator[dict[str, Any]]:
    """Of all tests, told at the end."""
    found: dict[str, Any] = {
        "shards": SHARDS,
        "sleep_s": SECONDS,
        "cores": os.cpu_count(),
        "prefect": prefect.__version__,
    }
    yield found
    text = json.dumps(found, indent=1) + "\n"
    sys.stdout.write(f"\n{text}")
    if path := os.environ.get("POPALIGN_BENCH_JSON"):
        Path(path).write_text(text)


@pytest.fixture(scope="module")
def alone(bench: Bench, numbers: dict[str, Any]) -> Measured:
    """The bare loop in one process."""
    measured = bench.measure("bare", ["bare 0 1"], seconds=min(SECONDS, 0.02))
    numbers["bare"] = measured.numbers()
    return measured


@pytest.fixture(scope="module")
def halves(bench: Bench, numbers: dict[str, Any]) -> Measured:
    """The bare loop in two processes, each with its own shards."""
    parts = [f"bare {part} {PROCESSES}" for part in range(PROCESSES)]
    measured = bench.measure("halves", parts, seconds=min(SECONDS, 0.02))
    numbers["halves"] = measured.numbers()
    return measured


def only_if_chosen(form: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(form not in FORMS, reason=f"POPALIGN_BENCH_FORMS leaves out {form}")


def each_once(measured: Measured) -> bool:
    return len(set(measured.names)) == len(measured.names) == SHARDS


@only_if_chosen("stage")
def test_a_stage_in_one_process(bench: Bench, alone: Measured, numbers: dict[str, Any]) -> None:
    measured, server = bench.watched(lambda: bench.measure("stage", ["stage"], seconds=SECONDS))
    cost = beyond(measured, alone)
    numbers["stage"] = {**measured.numbers(), "server": server, "beyond_bare": cost}
    assert each_once(measured)
    assert server["more"]["tasks completed"] == server["more"]["commits announced"] == SHARDS
    assert measured.growth(CPU) < MOST_GROWTH
    assert cost["percent"] <= MOST_PERCENT


@only_if_chosen("dispatched")
def test_a_stage_sent_to_two_workers(bench: Bench, halves: Measured, numbers: dict[str, Any]) -> None:
    bench.call("deploy", str(bench.folder / "dispatched"))
    with ExitStack() as workers:
        for number in range(PROCESSES):
            workers.enter_context(bench.working(f"gpu{number}", "dispatched", DISPATCHED_SECONDS))
        measured, server = bench.watched(
            lambda: bench.measure("dispatched", ["dispatched"], seconds=DISPATCHED_SECONDS)
        )
    cost = beyond(measured, halves)
    numbers["dispatched"] = {**measured.numbers(), "server": server, "beyond_bare": cost}
    assert each_once(measured)
    assert len(measured.sleeps) == PROCESSES
    # Prefect records a task of the ordering flow for each run that it started.
    assert server["more"]["tasks completed"] == SHARDS + PROCESSES
    assert server["more"]["commits announced"] == SHARDS
    assert measured.growth(CPU) < MOST_GROWTH
    assert cost["percent"] <= MOST_PERCENT


@only_if_chosen("claims")
def test_two_processes_that_claim_the_same_shards(bench: Bench, halves: Measured, numbers: dict[str, Any]) -> None:
    """Without Prefect, against two processes that need no claims."""
    measured = bench.measure("claims", ["claims"] * PROCESSES, seconds=min(SECONDS, 0.02))
    numbers["claims"] = {
        **measured.numbers(),
        "median_seconds_more": median(measured.gaps(WALL)) - median(halves.gaps(WALL)),
        "median_cpu_seconds_more": (more := median(measured.gaps(CPU)) - median(halves.gaps(CPU))),
    }
    assert each_once(measured)
    assert len(measured.sleeps) == PROCESSES
    assert more < MOST_CPU_SECONDS_OF_CLAIMS
