"""An assessment of labels that are written down: every number that is reported, by hand."""

import math
from dataclasses import replace

import pytest

from popalign_core.attributes import AXES
from popalign_core.classification import Status
from popalign_core.config import with_settings
from popalign_core.reporting.queries import sql_queries
from popalign_core.reporting.report_data import ReportData
from storage.artifacts import ArtifactRef
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks.assessment import assess
from tasks.classification import attributes_of
from tasks.expansion import write_prompts
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
    # Two prompts in which one group is alone say next to nothing of others.
    assert none["high"] > 0.9
    by_prompt = [row for row in read_artifact(ref, "group_shares") if row["prompt_id"] and row["group"] == "woman"]
    assert {(row["low"], row["interval"]) for row in by_prompt if row["model_id"] == BASE} == {(0.0, "clopper-pearson")}


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


def test_cells_of_two_axes_hold_every_image(written_run) -> None:
    """Also once the assessment has crossed the axes itself."""
    axes = ("perceived_gender", "perceived_skin_tone")
    config = with_settings(written_run.config, {"expansion.axes": ",".join(axes)})
    run = replace(written_run, run_id="crossed", config=config)
    write_prompts.fn(run.workspace, run.run_id, config.expansion)
    shown = {
        "perceived_gender": alternating,
        "perceived_skin_tone": lambda row: "dark" if row["sample_index"] else None,
    }
    for model in (BASE, MODEL):
        for purpose, roles in (("evaluation", ("judge", "builder")), ("obedience", ("judge",))):
            samples = run.commit_samples(model, purpose)
            for role in roles:
                commit_labels_of(samples, role, shown)
    ref = assess.fn(run.workspace, run.run_id, run.config, MODEL)
    place = Workspace.open(run.workspace)
    rebuild_catalog(place)
    held_out = "split = 'eval'"
    judged = f"{held_out} AND classifier_id = 'written down for the judge'"
    cells = query(place, f"FROM cells('{run.run_id}', '{BASE}') WHERE {judged}").to_pylist()
    assert len(cells) == 10
    assert {(row["n"], row["unknown"]) for row in cells} == {(14, 2)}
    assert {row["cell"]: row["count"] for row in cells if row["count"]} == {"woman x dark": 6, "man x dark": 8}
    crossed = [row for row in read_artifact(ref, "group_shares") if " & " in row["axis"] and row["prompt_id"] is None]
    assert sum(row["count"] for row in crossed if row["model_id"] == BASE) == 14

    shares = query(place, f"FROM shares('{run.run_id}', '{BASE}') WHERE {held_out} AND subject IS NULL").to_pylist()
    dark = only(shares, group="dark")
    assert (dark["count"], dark["n"], dark["unknown"]) == (14, 14, 2)
    assert (dark["least"], dark["most"]) == (14 / 16, 1.0)
    assert (only(shares, group="light")["least"], only(shares, group="light")["most"]) == (0.0, 2 / 16)
    changes = query(place, f"FROM changes('{run.run_id}') WHERE axis = 'perceived_gender'").to_pylist()
    assert {(row["changed"], row["p_value"]) for row in changes} == {(0, 1.0)}
    assert [row["n"] for row in changes if row["text"] is None] == [16]


def commit_labels_of(samples: ArtifactRef, role: str, shown: dict) -> None:
    """Of several axes; None is a low confidence."""
    rows = []
    for row in read_artifact(samples, "samples"):
        identity = {name: row[name] for name in ("run_id", "model_id", "sample_id", "prompt_id")}
        for axis, label in shown.items():
            said = label(row)
            groups = len(AXES[axis].groups)
            rows.append(
                {
                    **identity,
                    "classifier_id": f"written down for the {role}",
                    "axis": axis,
                    "label": said or AXES[axis].groups[0],
                    "confidence": 0.9 if said else 0.5,
                    "probabilities": [1 / groups] * groups,
                    "status": str(Status.OK if said else Status.LOW_CONFIDENCE),
                }
            )
    with staged_artifact(attributes_of(samples, role)) as folder:
        write_rows(folder, "attributes", rows)


def test_every_query_of_the_report_is_answered_by_the_catalog(written_run) -> None:
    ref = assessed(written_run, lambda _: "man", alternating)
    place = Workspace.open(ref.workspace)
    rebuild_catalog(place)
    data = ReportData(
        run_id=ref.run_id,
        created="",
        config={},
        versions={},
        base_model_id=BASE,
        model_id=MODEL,
        judge_id=read_artifact(ref, "disparities")[0]["judge_id"],
        builder_id="",
        group_shares=read_artifact(ref, "group_shares"),
    )
    answered = {title: query(place, sql.removesuffix(";")).num_rows for title, sql in sql_queries(data)}
    assert len(answered) > 10
    # What this run has not done: no training, no populations, nobody was looked for, and nobody was asked.
    empty = {title for title, rows in answered.items() if not rows}
    assert empty == {
        "Validation by round",
        "Training, step by step",
        "Populations of each round",
        "What changed outside the person",
        "How many images were drawn, and why no more",
        "Several training seeds",
        "Shares corrected for the judge's errors, from an audit",
        "Votes of people",
        "Prompts that gave no preference",
        # The labels are said by nobody, and so not by the run's judge.
        "The images behind a share, one group of one prompt",
    }
