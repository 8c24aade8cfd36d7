"""Studies and audits on a run that is written down: pages, files of answers, tables, corrected shares, the report."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import AnswerFile, UnusableAnswers, checksum
from storage.catalog import query, rebuild_catalog
from storage.layout import Workspace
from storage.tables import read_rows
from tasks.audits import create_audit, ingest_audits
from tasks.corrections import newest_corrections
from tasks.run import BASE, record_run
from tasks.studies import StudyRequest, create_study, ingest_votes, study_results

MODEL, AXIS = "round-1", "perceived_gender"
REQUEST = StudyRequest(model_id=MODEL, prompts=3, grid=4, image_size=64)


def even(row) -> str:
    return "man" if row["sample_index"] % 2 else "woman"


@pytest.fixture
def drawn_run(written_run):
    """Base: men alone as classified. Aligned: half and half, one image a prompt unknown."""
    record_run(written_run.workspace, written_run.run_id, "emoji", written_run.config)
    for model, label in ((BASE, lambda _: "man"), (MODEL, lambda row: None if row["sample_index"] == 0 else even(row))):
        samples = written_run.commit_samples(model, "evaluation")
        written_run.commit_labels(samples, "judge", label)
    return written_run


def page_data(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def answered(page: Path, folder: Path, choose: Callable[[dict, dict], str], alias: str = "bat", leave: int = 0) -> Path:
    """The file that the page would give. choose: of an item and a question; leave: so many unanswered."""
    data = page_data(page)
    answers = [
        {"item": item["id"], "ask": ask["id"], "choice": choose(item, ask), "milliseconds": 1200}
        | {"left": item["options"][0]["id"] if len(item["options"]) > 1 else ""}
        for item in data["items"]
        for ask in item["asks"]
    ]
    values = {name: data[name] for name in ("format", "version", "kind", "id", "digest")}
    values |= {"alias": alias, "complete": not leave, "answers": answers[: len(answers) - leave], "checksum": ""}
    file = AnswerFile.model_validate(values)
    path = folder / f"{alias}.json"
    path.write_text(file.model_copy(update={"checksum": checksum(file)}).model_dump_json())
    return path


def prefer(run, model: str) -> Callable[[dict, dict], str]:
    rows = read_rows(Workspace.open(run.workspace), run.run_id, "studies")
    sides = {row["option_id"]: row["model_id"] for row in rows}
    identical = {row["trial_id"] for row in rows if row["check"] == "identical"}

    def choose(item: dict, _ask: dict) -> str:
        if item["id"] in identical:
            return "tie"
        return next(option["id"] for option in item["options"] if sides[option["id"]] == model)

    return choose


def test_a_study_from_page_to_win_rate(drawn_run, tmp_path):
    page = create_study(drawn_run.workspace, drawn_run.run_id, REQUEST)
    first = page.read_bytes()
    assert create_study(drawn_run.workspace, drawn_run.run_id, REQUEST).read_bytes() == first
    text = page.read_text()
    assert MODEL not in text
    assert "base/" not in text
    files = [answered(page, tmp_path, prefer(drawn_run, MODEL), alias) for alias in ("a", "b")]
    ingest_votes(drawn_run.workspace, [*files, answered(page, tmp_path, prefer(drawn_run, BASE), "c")])
    (result,) = study_results(drawn_run.workspace, drawn_run.run_id)
    assert [(row.level, row.question, row.wins, row.losses, row.raters) for row in result.questions] == [
        ("population", "quality", 4, 2, 3),
        ("population", "diversity", 4, 2, 3),
        ("single", "quality", 4, 2, 3),
        ("single", "match", 4, 2, 3),
    ]
    assert result.questions[0].win_rate.value == pytest.approx(2 / 3)
    assert (result.raters.consistency.value, result.raters.attention.value) == (1.0, 1.0)
    place = Workspace.open(drawn_run.workspace)
    rebuild_catalog(place)
    found = query(place, "SELECT count(DISTINCT rater) AS raters FROM votes WHERE preferred_model_id = 'round-1'")
    assert found.to_pylist() == [{"raters": 2}]


def test_files_are_refused_before_anything_is_stored(drawn_run, tmp_path):
    page = create_study(drawn_run.workspace, drawn_run.run_id, REQUEST)
    good = answered(page, tmp_path, prefer(drawn_run, MODEL), "good")
    tampered = tmp_path / "tampered.json"
    tampered.write_text(good.read_text().replace('"alias":"good"', '"alias":"other"'))
    short = answered(page, tmp_path, prefer(drawn_run, MODEL), "short", leave=2)
    for bad, message in ((tampered, "was changed"), (short, "--incomplete"), (good, "one call")):
        with pytest.raises(UnusableAnswers, match=message):
            ingest_votes(drawn_run.workspace, [good, bad])
    assert read_rows(Workspace.open(drawn_run.workspace), drawn_run.run_id, "votes") == []
    ingest_votes(drawn_run.workspace, [good, short], incomplete=True)
    with pytest.raises(UnusableAnswers, match="was ingested before"):
        ingest_votes(drawn_run.workspace, [good])
    changed = answered(page, tmp_path, prefer(drawn_run, BASE), "good")
    with pytest.raises(UnusableAnswers, match="second file of 'good'"):
        ingest_votes(drawn_run.workspace, [changed])
    with pytest.raises(UnusableAnswers, match="which no run in"):
        ingest_votes(str(tmp_path / "elsewhere"), [changed])
    with pytest.raises(UnusableAnswers, match="popalign study ingest"):
        ingest_audits(drawn_run.workspace, [changed])


def test_another_study_of_the_same_name_is_refused(drawn_run):
    create_study(drawn_run.workspace, drawn_run.run_id, REQUEST)
    other = StudyRequest(model_id=MODEL, prompts=3, grid=5, image_size=64)
    with pytest.raises(InvalidInput, match="another --name"):
        create_study(drawn_run.workspace, drawn_run.run_id, other)


def test_a_run_without_a_decision_or_images_is_told(drawn_run):
    with pytest.raises(InvalidInput, match="no decision yet"):
        create_study(drawn_run.workspace, drawn_run.run_id, StudyRequest())
    with pytest.raises(InvalidInput, match="no samples of 'round-9'"):
        create_audit(drawn_run.workspace, drawn_run.run_id, model_id="round-9")


def perceived(run, label: Callable[[str, int], str]) -> Callable[[dict, dict], str]:
    """label: of model and sample index."""
    rows = read_rows(Workspace.open(run.workspace), run.run_id, "audit_samples")
    by_item = {row["item_id"]: row["sample_id"].split("/") for row in rows}
    return lambda item, _ask: label(by_item[item["id"]][0], int(by_item[item["id"]][2]))


def test_an_audit_corrects_the_shares(drawn_run, tmp_path):
    page = create_audit(drawn_run.workspace, drawn_run.run_id, images=100, model_id=MODEL)
    assert MODEL not in page.read_text()
    sample = read_rows(Workspace.open(drawn_run.workspace), drawn_run.run_id, "audit_samples")
    assert {row["inclusion_probability"] for row in sample} == {1.0}

    def people(model: str, index: int) -> str:
        # A quarter of the base model's "men" are women to people; one image of the aligned model cannot be told.
        if model == BASE:
            return "woman" if index % 4 == 0 else "man"
        return "cannot_tell" if index == 0 else even({"sample_index": index})

    ingest_audits(drawn_run.workspace, [answered(page, tmp_path, perceived(drawn_run, people), "ann")])
    shares = newest_corrections(drawn_run.workspace, drawn_run.run_id)["corrected_shares"]
    women = {(row["model_id"], row["method"]): row for row in shares if row["group"] == "woman"}
    assert women[BASE, "as_classified"]["share"] == 0.0
    assert women[BASE, "post_stratified"]["share"] == pytest.approx(0.25)
    assert women[BASE, "post_stratified"]["low"] < 0.25 < women[BASE, "post_stratified"]["high"]
    aligned = women[MODEL, "as_classified"]
    assert (aligned["share"], aligned["bound_low"], aligned["bound_high"]) == pytest.approx((3 / 7, 3 / 8, 4 / 8))
    assert women[MODEL, "post_stratified"]["bound_high"] - women[MODEL, "post_stratified"][
        "bound_low"
    ] == pytest.approx(1 / 8)
    (cell,) = [
        row
        for row in newest_corrections(drawn_run.workspace, drawn_run.run_id)["confusion_matrices"]
        if (row["perceived"], row["predicted"]) == ("woman", "man")
    ]
    assert (cell["count"], cell["n"]) == (4, 10)
    # A second auditor who sees it otherwise in two images: no plurality there, and newer rows.
    ingest_audits(drawn_run.workspace, [answered(page, tmp_path, perceived(drawn_run, people), "ben")])
    newest = newest_corrections(drawn_run.workspace, drawn_run.run_id)["corrected_shares"]
    assert {row["auditors"] for row in newest} == {2}
    assert [row["share"] for row in newest] == [row["share"] for row in shares]


def test_an_unfinished_audit_is_refused(drawn_run, tmp_path):
    page = create_audit(drawn_run.workspace, drawn_run.run_id, images=12, model_id=MODEL)
    short = answered(page, tmp_path, lambda *_: "man", "ann", leave=1)
    with pytest.raises(UnusableAnswers, match="11 of 12 answers"):
        ingest_audits(drawn_run.workspace, [short])


def test_commands_from_page_to_tables(drawn_run, tmp_path):
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "-w", drawn_run.workspace], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    run_id, model = drawn_run.run_id, ("--model", MODEL, "--image-size", "64")
    created = run("study", "create", run_id, *model, "--grids", "evenness", "--singles", "", "--grid", "4")
    page = Path(created.split(" Send")[0].replace(" ", ""))
    file = answered(page, tmp_path, prefer(drawn_run, MODEL), "a b")
    assert "a b: 6 votes on study" in run("study", "ingest", str(file))
    shown = run("study", "results", run_id)
    assert "population, evenness, perceived_gender" in shown
    assert "100.0% [" in shown
    assert "Identical sides told: 100.0%" in shown
    created = run("audit", "create", run_id, *model, "--images", "16")
    page = Path(created.split(" Send")[0].replace(" ", ""))
    run("audit", "ingest", str(answered(page, tmp_path, lambda *_: "woman", "c")))
    shown = run("audit", "results", run_id)
    assert "post stratified" in shown
    assert "of 16" in shown
