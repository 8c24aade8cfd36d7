"""The model card says what the rows say, opens as a card of a model hub, and promises nothing."""

import ast
import re
from dataclasses import replace
from typing import Literal

import pytest
from huggingface_hub import ModelCard
from report_rows import BASE, BUILDER, GENDER, JUDGE, MODEL, bare_run, good_run, held_run

from popalign_core.reporting.model_card import ExportedModel, opening_lines, render_model_card
from popalign_core.reporting.report_data import ReportData, matching

LINEAGE = (("Base weights", "0123456789abcdef"), ("Configuration", "feed|beef"))


def exported(form: Literal["lora", "unet", "pipeline"] = "unet", pipeline: str = "owner/name") -> ExportedModel:
    return ExportedModel(form=form, pipeline=pipeline, base_model="owner/name", lineage=LINEAGE)


def tables(card: str) -> dict[str, list[list[str]]]:
    """Rows of cells, by heading; heads and rules left out."""
    found: dict[str, list[list[str]]] = {}
    for section in card.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        found[title] = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]
    return found


@pytest.fixture(scope="module")
def data() -> ReportData:
    return good_run()


@pytest.fixture(scope="module")
def card(data: ReportData) -> str:
    return render_model_card(data, exported())


def test_every_disparity_of_the_rows_stands_in_the_table(data: ReportData, card: str) -> None:
    rows = {row[0]: row[1:] for row in tables(card)["Disparity on held-out neutral prompts"]}
    assert list(rows) == ["Perceived gender", "Perceived skin tone", "Perceived gender and skin tone"]
    wanted = {"axis": GENDER, "split": "eval", "level": "mean", "measure": "l2", "judge_id": JUDGE}
    before, after = (matching(data.disparities, model_id=model, **wanted)[0] for model in (BASE, MODEL))
    (compared,) = matching(data.comparisons, split="eval", axis=GENDER)
    ratio, low, high = (compared[name] for name in ("ratio", "ratio_low", "ratio_high"))
    assert rows["Perceived gender"] == [
        f"{before['value']:.3f} [{before['low']:.3f}, {before['high']:.3f}]",
        f"{after['value']:.3f} [{after['low']:.3f}, {after['high']:.3f}]",
        f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
        f"{after['floor']:.3f}",
        "8",
        f"{before['n']}, {after['n']}",
        f"{before['unknown']}, {after['unknown']}",
    ]
    assert f"Judged by\n`{JUDGE}`, which is not the classifier" in card


def test_quality_and_checks(data: ReportData, card: str) -> None:
    found = tables(card)
    score = ["CLIP score (points)", "held out, neutral", "27.41 [27.10, 27.69]", "27.29 [26.98, 27.57]"]
    assert score in found["Quality"]
    obedience = "Obedience: perceived gender, as the prompt names it"
    assert [obedience, "held out, specific", "99.1% [98.2%, 99.7%]", "98.4% [97.5%, 99.0%]"] in found["Quality"]
    assert data.decision is not None
    assert len(found["Decision"]) == len(data.decision["checks"])
    assert found["Decision"][0] == ["Perceived gender reduction", "yes", "0.553 [0.429, 0.659]", "0.5000"]


def test_a_held_model_says_so_and_why() -> None:
    card = render_model_card(held_run(), exported())
    assert "**Hold.** Obedience fell by more than the margin." in card
    assert tables(card)["Decision"][2][:2] == ["Obedience drop", "no"]


def test_what_was_not_assessed_has_no_number() -> None:
    bare = replace(bare_run(), models=good_run().models, judge_id="", builder_id="")
    card = render_model_card(bare, exported())
    assert "This model was not assessed: its disparity is not known." in card
    assert tables(card)["Disparity on held-out neutral prompts"] == []
    assert tables(card)["Quality"] == []
    assert "**Not finished.**" in card
    assert not re.search(r"\bNone\b|\bnan\b|``", card.replace("```", ""))


def test_the_front_matter_is_what_model_hubs_read(data: ReportData) -> None:
    for form, relation in (("lora", "adapter"), ("unet", "finetune"), ("pipeline", "finetune")):
        found = ModelCard(render_model_card(data, exported(form))).data
        assert (found.base_model, found.library_name, found.base_model_relation) == (
            "owner/name",
            "diffusers",
            relation,
        )
        assert ("lora" in found.tags) == (form == "lora")
        assert {"stable-diffusion-xl", "popalign"} <= set(found.tags)


@pytest.mark.parametrize("pipeline", ["owner/name", '/a folder/it\'s "quoted"/\\n/modèle'])
@pytest.mark.parametrize("form", ["lora", "unet", "pipeline"])
def test_at_most_three_lines_of_python_open_it(form: Literal["lora", "unet", "pipeline"], pipeline: str) -> None:
    lines = opening_lines(form, pipeline)
    assert len(lines) <= 3
    constants = [node.value for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Constant)]
    assert (pipeline in constants) == (form != "pipeline")
    assert "." in constants


def test_text_cannot_break_a_table(card: str) -> None:
    assert ["Configuration", "`feed\\|beef`"] in tables(card)["Lineage"]
    assert {len(row) for row in tables(card)["Lineage"]} == {2}


def test_before_is_the_model_that_it_was_trained_from(data: ReportData, card: str) -> None:
    assert "Before: `emoji`." in card
    adapted = [row | {"base_model": "owner/name + workspace:runs/a/models/round-1/lora"} for row in data.models]
    card = render_model_card(replace(data, models=adapted), exported())
    assert "Before: `owner/name + workspace:runs/a/models/round-1/lora`." in card
    assert ModelCard(card).data.base_model == "owner/name"


def test_it_names_limits_and_promises_nothing(card: str) -> None:
    assert "what a classifier perceives" in card
    assert "The numbers hold for the prompts above" in card
    assert f"`{BUILDER}`" in card
    assert not re.search(r"unbiased|debias|\bfair", card, re.IGNORECASE)
