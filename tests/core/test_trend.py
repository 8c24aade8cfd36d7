"""The page over many runs: what is drawn, what is joined, and what is said where runs cannot be compared."""

import pytest
import trend_runs as made_up
from report_page import Page

from popalign_core.errors import InvalidInput
from popalign_core.reporting.curves import TrendPoint, trend_chart
from popalign_core.reporting.report_data import Measured
from popalign_core.reporting.trend import IMAGES, breaks, disparity_figures, render_trend

QUERIES = (("All", "FROM nights();"),)


def page_of(runs) -> Page:
    return Page(render_trend(runs, "2026-11-27", QUERIES))


@pytest.mark.parametrize("state", made_up.STATES)
def test_every_number_that_is_drawn_stands_in_a_table(state: str) -> None:
    runs = made_up.STATES[state]()
    page = page_of(runs)
    shown = page.attribute("value")
    for run in runs:
        assert run.run_id in page.text
        assert all(repr(row["value"]) in shown for row in run.disparities)
    assert list(page.sections) == ["figures", "breaks", "runs", "reading", "queries"]


def test_a_workspace_without_a_run_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no run"):
        render_trend([], "", QUERIES)


def test_another_judge_breaks_the_line_and_is_named() -> None:
    runs = made_up.troubled()
    (found,) = breaks(runs)
    assert (found.run_id, found.what) == ("night-005", [("Judge", "heads:a@1", "heads:other@9")])
    page = page_of(runs)
    cells = [cell.text for cell in page.sections["breaks"].rows[1]]
    assert cells == ["night-005", "Judge", "heads:a@1", "heads:other@9"]
    assert "measured otherwise" in page.text
    assert breaks(made_up.three()) == []


def test_another_number_of_images_breaks_the_line_and_says_why() -> None:
    runs = [made_up.night(0), made_up.night(1, images=96)]
    (found,) = breaks(runs)
    assert (found.run_id, found.what) == ("night-001", [(IMAGES, "48", "96")])
    page = page_of(runs)
    assert "L2 depends on the number of held-out images a prompt" in page.sections["breaks"].text
    assert 'class="trend' not in disparity_figures(runs, [found])[0].chart
    assert "L2 depends" not in page_of(made_up.troubled()).text


def test_a_night_without_figures_breaks_nothing_and_one_with_half_of_them_shows_them() -> None:
    page = page_of(made_up.troubled())
    assert page.text.count("No decision") == 0  # the latest has one
    rows = {row[0].text.split()[0]: row for row in page.sections["runs"].rows[1:]}
    assert [rows[f"night-{number:03d}"][1].text for number in range(5)] == [
        "Promote",
        "None",
        "Promote",
        "None",
        "Hold",
    ]
    assert breaks(made_up.troubled()[:5]) == []


def test_lines_join_neighbours_and_pass_over_a_run_that_was_not_measured() -> None:
    def value(number: float) -> Measured:
        return Measured(number, number - 0.1, number + 0.1)

    points = [TrendPoint("a", value(0.5), value(0.25)), TrendPoint("b", None, None), TrendPoint("c", value(0.5), None)]
    assert trend_chart(points).count('class="trend before"') == 1
    assert trend_chart(points).count('class="trend after"') == 0
    broken = [*points[:2], TrendPoint("c", value(0.5), None, breaks=True)]
    assert trend_chart(broken).count('class="trend') == 0
    assert trend_chart(broken).count('class="mark') == 3
    assert "No run has been measured" in trend_chart([TrendPoint("a", None, None)])
