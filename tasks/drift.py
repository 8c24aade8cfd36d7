"""Comparison of a night's base model with the night before."""

import json
from collections.abc import Mapping
from dataclasses import asdict

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.drift import Drift, Measured, drifted
from popalign_core.sampler_facts import difference_text, sampler_differences
from storage.artifacts import committed_keys
from storage.layout import Workspace
from storage.tables import read_rows
from tasks.events import DRIFTED, emit
from tasks.run import BASE
from tasks.samplers import samplers_of

MODEL_SETTINGS = ("model", "model_lora", "model_unet")


@task(cache_policy=NO_CACHE)
def report_drift(workspace: str, run_id: str, series: str) -> list[Drift]:
    """Emits an event for every axis on which the base model's disparity moved since the last comparable run.

    series: what the ids of comparable runs begin with; of those the latest before this one that started from the same
    model, and was measured by the same judge on the same held-out prompts with as many images of each, is taken:
    another judge perceives otherwise, and with fewer images L2 is larger by what chance adds.
    """
    place = Workspace.open(workspace)
    now, model = _base_disparities(place, run_id), _start_model(place, run_id)
    earlier = [other for other in place.run_ids() if other.startswith(series) and other < run_id]
    for other in reversed(earlier):
        before = _base_disparities(place, other)
        if not before or _start_model(place, other) != model:
            continue
        measured = [_measured_with(place, one) for one in (other, run_id)]
        if unlike := [name for name, value in measured[1].items() if measured[0][name] != value]:
            get_run_logger().info("not compared with %s: other %s", other, ", ".join(unlike))
            continue
        found = drifted(before, now)
        differences = sampler_differences([*_base_samplers(place, other), *_base_samplers(place, run_id)])
        if differences:
            text = difference_text(differences)
            get_run_logger().warning("base models of %s and %s were drawn differently: %s", other, run_id, text)
        for drift in found:
            get_run_logger().warning(
                "%s disparity of the base model: %.3f, was %.3f in %s (chance: %.3f)",
                drift.axis,
                drift.now.value,
                drift.before.value,
                other,
                drift.tolerance,
            )
            facts = {"compared_with": other, "drawn_differently": difference_text(differences)}
            emit(DRIFTED, run_id, f"drift.{drift.axis}", {"run_id": run_id, **facts, **asdict(drift)})
        return found
    return []


def _base_disparities(place: Workspace, run_id: str) -> dict[str, Measured]:
    wanted = {"model_id": BASE, "split": "eval", "level": "mean", "measure": "l2", "target": "uniform"}
    rows = read_rows(place, run_id, "disparities", equal=wanted)
    return {row["axis"]: Measured(row["value"], row["low"], row["high"]) for row in rows}


def _measured_with(place: Workspace, run_id: str) -> dict[str, set[object]]:
    """What a disparity depends on beside the model."""
    wanted = {"model_id": BASE, "split": "eval", "level": "prompt", "measure": "l2", "target": "uniform"}
    columns = ["prompt_id", "judge_id", "n", "unknown"]
    rows = read_rows(place, run_id, "disparities", columns=columns, equal=wanted)
    return {
        "held-out prompts": {row["prompt_id"] for row in rows},
        "judge": {row["judge_id"] for row in rows},
        "number of images a prompt": {row["n"] + row["unknown"] for row in rows},
    }


def _base_samplers(place: Workspace, run_id: str) -> list[Mapping[str, str]]:
    shards = committed_keys(place, run_id, "samples")
    return list(samplers_of(shard for shard in shards if shard.key.startswith(f"{BASE}.evaluation.")).values())


def _start_model(place: Workspace, run_id: str) -> list[str]:
    rows = read_rows(place, run_id, "runs")
    config = json.loads(rows[0]["config_json"]) if rows else {}
    return [config.get(name, "") for name in MODEL_SETTINGS]
