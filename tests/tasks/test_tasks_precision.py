"""Held-out images are doubled until the interval of what changed is narrow, and what was decided stands in a table."""

from dataclasses import replace

from popalign_core.config import with_settings
from storage.artifacts import is_committed
from storage.tables import read_artifact
from tasks.assessment import assess
from tasks.precision import STOP, extend_evaluation
from tasks.run import BASE, reference
from tasks.sampling import images_missing, plan_shards

MODEL = "round-1"


def mixed(row) -> str:
    return "man" if (row["sample_index"] * 7 + len(row["prompt_id"])) % 3 else "woman"


def commit(run, purpose: str) -> None:
    for model, label in ((BASE, lambda _: "man"), (MODEL, mixed)):
        for role in ("judge", "builder"):
            run.commit_labels(run.commit_samples(model, purpose), role, label)


def configured(written_run, **settings: object):
    changes = {f"assessment.{name}": str(value) for name, value in settings.items()}
    return replace(written_run, config=with_settings(written_run.config, changes))


def rows(run, key: str) -> list[dict]:
    return read_artifact(reference(run.workspace, run.run_id, "extensions", key), "extensions")


def test_a_wide_interval_is_met_with_twice_the_images_until_no_more_are_allowed(written_run) -> None:
    run = configured(written_run, precision=0.001, max_images=16)
    commit(run, "evaluation")
    place = (run.workspace, run.run_id, run.config)
    first = plan_shards(*place, BASE, "evaluation")

    assert extend_evaluation.fn(*place, MODEL)
    (row,) = rows(run, "evaluation-2")
    assert (row["images"], row["wanted"], row["reason"], row["drawn_next"]) == (8, 0.001, "too wide", "evaluation-2")
    both = plan_shards(*place, BASE, "evaluation")
    assert both[: len(first)] == first
    assert images_missing(both, run.config) == 16  # 8 more of each of two prompts

    commit(run, "evaluation-2")
    samples = [row["sample_id"] for shard in both for row in read_artifact(shard, "samples")]
    assert len(set(samples)) == len(samples) == 32
    assert not extend_evaluation.fn(*place, MODEL)
    (row,) = rows(run, STOP)
    assert (row["images"], row["reason"], row["drawn_next"]) == (16, "no more images allowed", None)
    assert not extend_evaluation.fn(*place, MODEL)

    for model in (BASE, MODEL):
        run.commit_labels(run.commit_samples(model, "obedience"), "judge", lambda _: "man")
    ref = assess.fn(*place, MODEL)
    measured = [r for r in read_artifact(ref, "disparities") if r["level"] == "mean" and r["measure"] == "l2"]
    assert {row["n"] for row in measured} == {32}


def test_a_narrow_interval_ends_sampling_at_once(written_run) -> None:
    run = configured(written_run, precision=2)
    commit(run, "evaluation")
    assert not extend_evaluation.fn(run.workspace, run.run_id, run.config, MODEL)
    (row,) = rows(run, STOP)
    assert row["reason"] == "narrow enough"
    assert 0 < row["half_width"] <= 2


def test_without_a_wanted_precision_nothing_is_asked(written_run) -> None:
    commit(written_run, "evaluation")
    assert not extend_evaluation.fn(written_run.workspace, written_run.run_id, written_run.config, MODEL)
    assert not is_committed(reference(written_run.workspace, written_run.run_id, "extensions", STOP))
