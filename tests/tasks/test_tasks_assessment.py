"""An assessment of labels that are written down: every number that is reported, by hand."""

import math

import pytest

from storage.artifacts import ArtifactRef
from storage.tables import read_artifact
from tasks.assessment import assess
from tasks.run import BASE, read_prompts, reference

MODEL = "round-1"
FLOOR = math.sqrt((1 - 1 / 2) / 8)


def alternating(row) -> str:
    return "man" if row["sample_index"] % 2 else "woman"


def assessed(run, before, after, obeyed=lambda _: True) -> ArtifactRef:
    """before, after: the label of a neutral image. obeyed: whether an aligned model's specific image is as asked."""
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(run.workspace, run.run_id)}
    for model, label in ((BASE, before), (MODEL, after)):

        def asked(row, model=model) -> str:
            group = prompts[row["prompt_id"]].requested["perceived_gender"]
            kept = model == BASE or obeyed(row)
            return group if kept else {"man": "woman", "woman": "man"}[group]

        for role in ("judge", "builder"):
            run.commit_labels(run.commit_samples(model, "evaluation"), role, label)
        run.commit_labels(run.commit_samples(model, "obedience"), "judge", asked)
    return assess.fn(run.workspace, run.run_id, run.config, MODEL)


def only(rows: list[dict], **wanted) -> dict:
    (found,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found


def decision(ref: ArtifactRef) -> dict:
    (row,) = read_artifact(reference(ref.workspace, ref.run_id, "decisions", MODEL), "decisions")
    return row


def test_from_one_group_alone_to_even(written_run) -> None:
    ref = assessed(written_run, lambda _: "man", alternating)
    rows = read_artifact(ref, "disparities")
    for model, expected in ((BASE, math.sqrt(0.5)), (MODEL, 0.0)):
        row = only(rows, model_id=model, level="mean", measure="l2")
        assert row["value"] == pytest.approx(expected)
        assert row["floor"] == pytest.approx(FLOOR)
        assert row["n"] == 16
    change = only(read_artifact(ref, "comparisons"), measure="l2")
    assert change["difference"] == pytest.approx(-math.sqrt(0.5))
    assert change["ratio"] == pytest.approx(0.0)
    assert change["difference_high"] < 0
    assert decision(ref)["verdict"] == "promote"
    for model, kappa in ((BASE, math.nan), (MODEL, 1.0)):  # the base's images show one group alone
        row = only(read_artifact(ref, "agreements"), model_id=model, measure="cohen_kappa")
        assert row["value"] == pytest.approx(kappa, nan_ok=True)
        assert row["n"] == 16
    diversities = read_artifact(ref, "group_diversities")
    assert {(row["model_id"], row["group"]): row["n"] for row in diversities if row["split"] == "eval"} == {
        (BASE, "man"): 16,
        (BASE, "woman"): 0,
        (MODEL, "man"): 8,
        (MODEL, "woman"): 8,
    }
    assert {(row["group"], row["size"], row["value"] is None) for row in diversities} == {
        ("man", 6, False),
        ("woman", 0, True),
    }
    statuses = [row for row in read_artifact(ref, "status_counts") if row["model_id"] == BASE]
    assert {row["count"] for row in statuses if row["status"] == "ok"} == {16}


def test_shares_name_groups_that_never_occur(written_run) -> None:
    ref = assessed(written_run, lambda _: "man", alternating)
    shares = [row for row in read_artifact(ref, "group_shares") if row["prompt_id"] is None]
    none = only(shares, model_id=BASE, group="woman")
    assert (none["count"], none["n"], none["share"]) == (0, 16, 0.0)
    assert none["low"] == 0.0
    assert 0.0 < none["high"] < 0.25


def test_lost_obedience_holds_the_model(written_run) -> None:
    ref = assessed(written_run, lambda _: "man", alternating, obeyed=lambda row: row["sample_index"] % 2)
    change = only(read_artifact(ref, "comparisons"), measure="obedience")
    assert change["before"] == 1.0
    assert change["after"] == pytest.approx(0.5)
    failed = [check["name"] for check in decision(ref)["checks"] if not check["passed"]]
    assert decision(ref)["verdict"] == "hold"
    assert len(failed) == 1
    assert "obedience" in failed[0]


def test_unknowns_are_counted_apart_and_hold_the_model(written_run) -> None:
    """Even among the known, but half of the images can't be told any more."""
    ref = assessed(written_run, lambda _: "man", lambda row: alternating(row) if row["sample_index"] < 4 else None)
    row = only(read_artifact(ref, "disparities"), model_id=MODEL, level="mean", measure="l2")
    assert (row["n"], row["unknown"]) == (8, 8)
    assert row["value"] == pytest.approx(0.0)
    failed = [check["name"] for check in decision(ref)["checks"] if not check["passed"]]
    assert len(failed) == 1
    assert "unknown" in failed[0]


def test_the_same_images_score_the_same(written_run) -> None:
    """Both models' pictures are of the same noise here, so nothing may have changed but the labels."""
    ref = assessed(written_run, lambda _: "man", alternating)
    change = only(read_artifact(ref, "comparisons"), measure="clip_score")
    assert change["difference"] == 0.0
    distance = only(read_artifact(ref, "distances"), measure="frechet_to_base", split="eval")
    assert distance["value"] == pytest.approx(0.0, abs=1e-6)
    assert distance["null_high"] == pytest.approx(0.0, abs=1e-6)
