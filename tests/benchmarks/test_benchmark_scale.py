"""The paper-size job, 66,000 + 140,000 images, through planning, claims, storage and catalog; no network draws.

POPALIGN_BENCH_SHARES: of the paper's images a prompt, "0.05,0.25,1" (12,500, 54,400 and 206,000 images). Times are of
one process; that they grow no faster than the number of images is what is asserted. 2 GB in the temporary folder.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from paper_size import STEPS

from popalign_core.presets import preset
from popalign_core.stated_costs import classification_cost, sampling_cost
from popalign_core.workload import passes_per_image
from tasks.benchmarks import record_benchmark

pytestmark = pytest.mark.timeout(2 * 3600)

SHARES = sorted(float(share) for share in os.environ.get("POPALIGN_BENCH_SHARES", "0.05,0.25,1").split(","))
SCRIPT = Path(__file__).with_name("paper_size.py")
# Beyond the number of images: a busy machine, and a wider read from a colder disk.
MOST_GROWTH = 1.3
# What is over sooner says nothing about growth.
LEAST_SECONDS = 0.3
GIB = 2**30


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[float, dict[str, dict[str, Any]]]:
    """Numbers by share and step."""
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for share in SHARES:
        place = tmp_path_factory.mktemp("paper")
        found[share] = {step: run_step(step, place, share) for step in STEPS}
        shutil.rmtree(place)
    return found


def run_step(step: str, place: Path, share: float) -> dict[str, Any]:
    """In a process of its own: memory is of that step alone."""
    command = [sys.executable, str(SCRIPT), step, str(place), str(share)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, f"step {step} of {share} failed; its error is above"
    return json.loads(done.stdout.splitlines()[-1])


def times(steps: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Everything that a run, or somebody who looks at it, waits for beside the networks."""
    draw, half = steps["draw"], steps["half"]
    found = {f"{stage}_cpu_s": draw[stage]["cpu_s"] + half[stage]["cpu_s"] for stage in ("sampling", "classification")}
    found |= {name: steps["resume"][name] for name in ("start_s", "planning_s")}
    return found | {
        name: value for step in ("pair", "ask") for name, value in steps[step].items() if not name.startswith("mib_")
    }


def test_nothing_grows_faster_than_the_images(measured: dict[float, dict[str, dict[str, Any]]]) -> None:
    found = {steps["count"]["images"]: times(steps) for steps in measured.values()}
    sizes = sorted(found)
    growth = {
        (name, small, large): found[large][name] / found[small][name] / (large / small)
        for small, large in pairwise(sizes)
        for name in found[small]
        if found[small][name] > LEAST_SECONDS
    }
    sys.stdout.write(f"\n{json.dumps(found, indent=1)}\n")
    assert {key: value for key, value in growth.items() if value > MOST_GROWTH} == {}


def test_the_last_shards_cost_what_the_first_did(measured: dict[float, dict[str, dict[str, Any]]]) -> None:
    for steps in measured.values():
        for stage in ("sampling", "classification"):
            if steps["draw"][stage]["shards"] >= 100:
                assert steps["draw"][stage]["last_tenth_s"] < MOST_GROWTH * steps["draw"][stage]["first_tenth_s"]


def test_the_numbers_are_kept(measured: dict[float, dict[str, dict[str, Any]]]) -> None:
    config = preset("sdxl-paper")
    passes = passes_per_image(config.sampling.steps, config.sampling.guidance_scale)
    drawing = sampling_cost(config.model, "gpu", 1024, config.sampling.dtype, passes).seconds
    looking = classification_cost(config.model, "gpu").seconds
    for share, steps in measured.items():
        counted, spent = steps["count"], times(steps)
        images, settings = counted["images"], {"share": share, **counted}
        beside = spent["sampling_cpu_s"] + spent["classification_cpu_s"]
        values = {
            "gpu_hours_stated": (images * (drawing + looking) / 3600, "h"),
            "beside_the_networks": (1e3 * beside / images, "ms/image"),
            "files": (counted["files"], "files"),
            "disk_without_images": ((counted["bytes"] - counted["image_bytes"]) / images, "B/image"),
            "planning": (spent["planning_s"], "s"),
            "going_on": (spent["start_s"] + spent["planning_s"], "s"),
            "preferences": (spent["preferences_s"], "s"),
            "catalog": (spent["catalog_s"], "s"),
            "slowest_query": (max(value for name, value in spent.items() if " " in name), "s"),
            "status": (spent["status_s"], "s"),
            "planning_memory": ((steps["resume"]["mib_peak"] - steps["resume"]["mib_before"]) / 1024, "GiB"),
            "pairing_memory": ((steps["pair"]["mib_peak"] - steps["pair"]["mib_before"]) / 1024, "GiB"),
        }
        for name, (value, unit) in values.items():
            record_benchmark(f"scale.{images}.{name}", [value], unit, settings=settings)
