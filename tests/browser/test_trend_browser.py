"""The page over many runs in Chromium: silent, on its own, and within the width of a phone."""

from itertools import pairwise

import pytest

import trend_runs as made_up  # isort: skip - found beside the tests of the core, by conftest

from popalign_core.reporting.trend import render_trend
from tasks.trend import QUERIES


@pytest.mark.parametrize("state", made_up.STATES)
@pytest.mark.parametrize("width", [390, 1280])
def test_no_complaint_no_request_and_nothing_sticks_out(open_report, state: str, width: int) -> None:
    opened = open_report(render_trend(made_up.STATES[state](), "2026-11-27", QUERIES), width=width)
    assert opened.complaints == []
    assert opened.requests == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert "Population disparity over" in opened.page.title()


def test_labels_of_the_axis_do_not_run_into_each_other_on_a_phone(open_report) -> None:
    page = open_report(render_trend(made_up.hundred(), "2026-11-27", QUERIES), width=390).page
    boxes = [label.bounding_box() for label in page.locator("svg.plot").first.locator(".below").all()]
    assert len(boxes) > 2
    assert all(a["x"] + a["width"] < b["x"] for a, b in pairwise(boxes))
