"""The page over many runs, from a workspace's committed tables."""

from dataclasses import replace
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from popalign_core.config import with_settings
from popalign_core.errors import InvalidInput
from storage.catalog import rebuild_catalog
from storage.layout import Workspace
from storage.tables import read_artifact
from tasks.assessment import assess
from tasks.run import BASE, record_run, reference
from tasks.trend import refresh_trend, trend_runs, write_trend

MODEL = "round-1"


def finished(run, base: str) -> None:
    record_run(run.workspace, run.run_id, "emoji", run.config)
    for model in (BASE, MODEL):
        for role in ("judge", "builder"):
            run.commit_labels(
                run.commit_samples(model, "evaluation", fingerprint="f1"),
                role,
                lambda row, model=model: base if model == BASE or row["sample_index"] % 2 else "woman",
            )
        run.commit_labels(run.commit_samples(model, "obedience", fingerprint="f1"), "judge", lambda _: "man")
    assess.fn(run.workspace, run.run_id, run.config, MODEL)


def test_the_page_has_the_numbers_of_the_tables(written_run) -> None:
    finished(written_run, "man")
    place = Workspace.open(written_run.workspace)
    path = write_trend(written_run.workspace)
    assert path == place.root / "trend.html"
    (run,) = trend_runs(place)
    ref = reference(written_run.workspace, written_run.run_id, "disparities", MODEL)
    wanted = {"level": "mean", "measure": "l2", "split": "eval", "target": "uniform"}
    rows = [r for r in read_artifact(ref, "disparities") if all(r[k] == v for k, v in wanted.items())]
    assert {(r["which"], r["value"]) for r in run.disparities} == {
        ("before" if r["model_id"] == BASE else "after", r["value"]) for r in rows
    }
    assert run.comparable["Sampler"] == "f1"
    assert run.comparable["Held-out prompts"].startswith("2 texts, ")
    assert run.comparable["Held-out images a prompt"] == "8"
    scores = {(r["measure"], r["model_id"]): r for r in read_artifact(ref, "scores") if r["kind"] != "controls"}
    for row in run.comparisons:
        if row["measure"] == "unknown":
            assert row["before_low"] is None
            continue
        measure = f"obedience:{row['axis']}" if row["measure"] == "obedience" else row["measure"]
        for side, model in (("before", BASE), ("after", MODEL)):
            stored = scores[measure, model]
            assert (row[f"{side}_low"], row[f"{side}_high"]) == (stored["low"], stored["high"])
            assert row[side] == pytest.approx(stored["value"])
    assert run.verdict == "promote"
    assert {stage["stage"] for stage in run.stages} == {"assessment", "embedding"}
    text = path.read_text()
    assert all(repr(r["value"]) in text for r in rows)


def test_a_workspace_without_runs_is_said_so_and_ends_no_night(tmp_path: Path) -> None:
    with disable_run_logger():
        refresh_trend.fn(str(tmp_path))
    with pytest.raises(InvalidInput, match="no run"):
        write_trend(str(tmp_path))


def test_a_run_that_has_only_begun_is_listed(written_run) -> None:
    record_run(written_run.workspace, written_run.run_id, "emoji", written_run.config)
    other = replace(written_run, run_id="other", config=with_settings(written_run.config, {"seed": "1"}))
    record_run(other.workspace, other.run_id, "emoji", other.config)
    place = Workspace.open(written_run.workspace)
    rebuild_catalog(place)
    assert {(run.run_id, run.verdict, len(run.disparities)) for run in trend_runs(place)} == {
        ("written", "", 0),
        ("other", "", 0),
    }
    assert write_trend(written_run.workspace, last=1).is_file()
