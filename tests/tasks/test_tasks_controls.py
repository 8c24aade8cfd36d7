"""Controls of a run whose labels are written down: every number by hand, and the decision that reads them."""

from dataclasses import replace
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from popalign_core.classification import Status
from popalign_core.config import with_settings
from storage.commit import staged_artifact
from storage.tables import read_artifact, write_rows
from tasks.assessment import assess
from tasks.classification import attributes_of
from tasks.expansion import write_prompts
from tasks.run import BASE, read_prompts, reference

MODEL = "round-1"


@pytest.fixture
def run(written_run, tmp_path: Path):
    listed = tmp_path / "controls.txt"
    listed.write_text("Ada | perceived_gender=woman\nBob | perceived_gender=man\na tree\n")
    settings = {"expansion.controls": str(listed), "images.controls": "4"}
    found = replace(written_run, run_id="controlled", config=with_settings(written_run.config, settings))
    with disable_run_logger():
        write_prompts.fn(found.workspace, found.run_id, found.config.expansion)
    return found


def commit_statuses(samples, status) -> None:
    """By the builder. status: of a sample."""
    rows = [
        {
            **{name: row[name] for name in ("run_id", "model_id", "sample_id", "prompt_id")},
            "classifier_id": "written down",
            "axis": "perceived_gender",
            "label": None,
            "confidence": 0.5,
            "probabilities": [0.5, 0.5],
            "status": str(status(row)),
        }
        for row in read_artifact(samples, "samples")
    ]
    with staged_artifact(attributes_of(samples, "builder")) as folder:
        write_rows(folder, "attributes", rows)


def assessed(run, forgotten: int, people: int):
    """forgotten: images a person in which the aligned model shows the wrong group; people: in the picture of a tree."""
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(run.workspace, run.run_id)}
    for model in (BASE, MODEL):
        for role in ("judge", "builder"):
            run.commit_labels(
                run.commit_samples(model, "evaluation"),
                role,
                lambda row, model=model: "man" if model == BASE or row["sample_index"] % 2 else "woman",
            )
        run.commit_labels(
            run.commit_samples(model, "obedience"),
            "judge",
            lambda row: prompts[row["prompt_id"]].requested["perceived_gender"],
        )

        def fact(row, model=model):
            known = prompts[row["prompt_id"]].requested.get("perceived_gender", "man")
            wrong = model == MODEL and row["sample_index"] < forgotten
            return {"man": "woman", "woman": "man"}[known] if wrong else known

        def status(row, model=model):
            asked = prompts[row["prompt_id"]].kind != "no_person"
            there = asked or (model == MODEL and row["sample_index"] < people)
            return Status.OK if there else Status.NO_PERSON

        shard = run.commit_samples(model, "controls")
        run.commit_labels(shard, "judge", fact)
        commit_statuses(shard, status)
    ref = assess.fn(run.workspace, run.run_id, run.config, MODEL)
    (decision,) = read_artifact(reference(run.workspace, run.run_id, "decisions", MODEL), "decisions")
    return ref, decision


def test_controls_that_do_not_move_hold_nothing(run) -> None:
    ref, decision = assessed(run, forgotten=0, people=0)
    rows = {row["measure"]: row for row in read_artifact(ref, "comparisons") if row["split"] == "eval"}
    assert (rows["fact"]["before"], rows["fact"]["after"], rows["fact"]["axis"]) == (1.0, 1.0, "perceived_gender")
    assert rows["people_without_being_asked"]["after"] == 0.0
    similar = {row["kind"]: row for row in read_artifact(ref, "scores") if row["measure"] == "paired_similarity"}
    assert {kind: (row["value"], row["n"]) for kind, row in similar.items()} == {
        "neutral": (pytest.approx(1.0), 16),
        "fact": (pytest.approx(1.0), 8),
        "no_person": (pytest.approx(1.0), 4),
    }
    assert decision["verdict"] == "promote"


@pytest.mark.parametrize(("forgotten", "people", "name"), [(2, 0, "perceived_gender_fact_drop"), (0, 1, "people_rise")])
def test_facts_that_are_lost_and_people_nobody_asked_for_hold_the_model(run, forgotten, people, name) -> None:
    ref, decision = assessed(run, forgotten, people)
    assert [check["name"] for check in decision["checks"] if not check["passed"]] == [name]
    rows = {row["measure"]: row for row in read_artifact(ref, "comparisons") if row["split"] == "eval"}
    assert rows["fact"]["after"] == pytest.approx(1 - forgotten / 4)
    assert rows["people_without_being_asked"]["after"] == pytest.approx(people / 4)
