"""Comparison of a night's base model with the night before."""

import json
from dataclasses import asdict

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.drift import Drift, Measured, drifted
from storage.layout import Workspace
from storage.tables import read_rows
from tasks.events import DRIFTED, emit
from tasks.run import BASE

MODEL_SETTINGS = ("model", "model_lora", "model_unet")


@task(cache_policy=NO_CACHE)
def report_drift(workspace: str, run_id: str, series: str) -> list[Drift]:
    """Emits an event for every axis on which the base model's disparity moved since the last comparable run.

    series: what the ids of comparable runs begin with; of those the latest before this one that started from the same
    model is taken.
    """
    place = Workspace.open(workspace)
    now, model = _base_disparities(place, run_id), _start_model(place, run_id)
    earlier = [other for other in place.run_ids() if other.startswith(series) and other < run_id]
    for other in reversed(earlier):
        before = _base_disparities(place, other)
        if not before or _start_model(place, other) != model:
            continue
        found = drifted(before, now)
        for drift in found:
            get_run_logger().warning(
                "%s disparity of the base model: %.3f, was %.3f in %s (chance: %.3f)",
                drift.axis,
                drift.now.value,
                drift.before.value,
                other,
                drift.tolerance,
            )
            emit(DRIFTED, run_id, f"drift.{drift.axis}", {"run_id": run_id, "compared_with": other, **asdict(drift)})
        return found
    return []


def _base_disparities(place: Workspace, run_id: str) -> dict[str, Measured]:
    wanted = {"model_id": BASE, "split": "eval", "level": "mean", "measure": "l2"}
    rows = read_rows(place, run_id, "disparities", equal=wanted)
    return {row["axis"]: Measured(row["value"], row["low"], row["high"]) for row in rows}


def _start_model(place: Workspace, run_id: str) -> list[str]:
    rows = read_rows(place, run_id, "runs")
    config = json.loads(rows[0]["config_json"]) if rows else {}
    return [config.get(name, "") for name in MODEL_SETTINGS]
