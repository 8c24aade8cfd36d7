"""What people said, in the report: the numbers of the rows, and nothing where nobody was asked."""

import people_rows
import pytest
import report_rows as made_up
from report_page import Page

from popalign_core.raters.study_results import question_results
from popalign_core.reporting.report import render_report


@pytest.fixture(scope="module")
def data():
    return people_rows.run_with_people()


@pytest.fixture(scope="module")
def section(data):
    return Page(render_report(data)).sections["people"]


def test_win_rates_are_those_of_the_votes(data, section):
    results = question_results(data.votes, made_up.BASE, made_up.MODEL, seed=0)
    shown = [cell.values[0][0] for row in section.rows for cell in row if cell.values]
    assert len(results) == 4
    for result in results:
        assert result.win_rate.value in shown
        assert f"{result.losses}, {result.ties}, {result.wins} votes on 8 prompts by 5 raters" in section.text
    assert "Pairs shown twice, answered alike 100.0%" in section.text


def test_corrected_shares_stand_beside_those_as_classified(data, section):
    values = [value for row in section.rows for cell in row for value, _ in cell.values]
    for row in data.corrected_shares:
        if row["method"] == "post_stratified":
            assert row["share"] in values
            assert row["bound_low"] in values
    assert "corrected by the model's own audited images" in section.text
    assert "what 2 people perceived" in section.text


def test_every_cell_of_the_confusion_matrix_is_shown(data, section):
    values = [value for row in section.rows for cell in row for value, _ in cell.values]
    assert all(row["share"] in values for row in data.confusion_matrices if row["n"])


def test_nobody_asked_is_no_section():
    page = Page(render_report(made_up.good_run()))
    assert "people" not in page.sections
    assert "#people" not in [attributes.get("href") for _, attributes in page.elements]
