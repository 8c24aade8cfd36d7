"""A night's base model is compared with the last night that began with the same model."""

from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.drift import report_drift

AXIS = "perceived_gender"
SERIES = "nightly-emoji-"


def commit_night(
    workspace: Path,
    date: str,
    value: float,
    config: RunConfig | None = None,
    *,
    images: int = 50,
    judge: str = "j",
    prompts: tuple[str, str] = ("p", "q"),
) -> None:
    """Of two prompts, with so many images each."""
    run_id, root = f"{SERIES}{date}", str(Workspace.open(workspace).root)
    settings = (config or preset("emoji")).model_dump_json()
    with staged_artifact(ArtifactRef(root, run_id, "runs", "config")) as folder:
        write_rows(folder, "runs", [{"run_id": run_id, "preset": "emoji", "config_json": settings}])
    row = {"run_id": run_id, "judge_id": judge, "split": "eval", "prompt_id": None, "level": "mean", "axis": AXIS}
    row |= {"measure": "l2", "target": "uniform", "floor": 0.05, "n": 2 * images - 1, "unknown": 1}
    row |= {"low": value - 0.02, "high": value + 0.02, "value": value}
    aligned = row | {"model_id": "round-1", "value": 0.9}
    own = row | {"model_id": "base", "level": "prompt"}
    by_prompt = [own | {"prompt_id": name, "n": images - lost, "unknown": lost} for lost, name in enumerate(prompts)]
    with staged_artifact(ArtifactRef(root, run_id, "disparities", "round-1")) as folder:
        write_rows(folder, "disparities", [row | {"model_id": "base"}, aligned, *by_prompt])


def compare(workspace: Path, date: str) -> list[tuple[str, float, float]]:
    with disable_run_logger():
        found = report_drift.fn(str(workspace), f"{SERIES}{date}", SERIES)
    return [(drift.axis, drift.before.value, drift.now.value) for drift in found]


def test_the_first_night_has_nothing_to_compare_with(tmp_path: Path) -> None:
    commit_night(tmp_path, "20261101", 0.5)
    assert compare(tmp_path, "20261101") == []


@pytest.mark.parametrize(("now", "moved"), [(0.51, False), (0.528, False), (0.53, True), (0.4, True)])
def test_a_move_beyond_both_intervals_is_reported(tmp_path: Path, now: float, moved: bool) -> None:
    """Half widths of .02 and .02: chance explains up to .0283."""
    commit_night(tmp_path, "20261101", 0.5)
    commit_night(tmp_path, "20261102", now)
    assert compare(tmp_path, "20261102") == ([(AXIS, 0.5, now)] if moved else [])


@pytest.mark.parametrize("other", [{"images": 100}, {"judge": "j+bfloat16"}, {"prompts": ("p", "r")}])
def test_a_night_that_was_measured_otherwise_is_passed_over(tmp_path: Path, other: dict[str, Any]) -> None:
    commit_night(tmp_path, "20261101", 0.5)
    commit_night(tmp_path, "20261102", 0.3, **other)
    commit_night(tmp_path, "20261103", 0.5)
    assert compare(tmp_path, "20261102") == []
    assert compare(tmp_path, "20261103") == []
    commit_night(tmp_path, "20261104", 0.3)
    assert compare(tmp_path, "20261104") == [(AXIS, 0.5, 0.3)]


def test_the_last_comparable_night_counts(tmp_path: Path) -> None:
    commit_night(tmp_path, "20261101", 0.5)
    commit_night(tmp_path, "20261102", 0.3)
    commit_night(tmp_path, "20261103", 0.1, with_settings(preset("emoji"), {"model_lora": "other"}))
    commit_night(tmp_path, "20261104", 0.3)
    commit_night(tmp_path, "20261105", 0.9)  # later than the one that is looked at
    assert compare(tmp_path, "20261104") == []
