"""The report in Chromium: silent, on its own, readable on a phone, in the dark, on paper and by keyboard."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import people_rows
import pytest
import report_rows as made_up

from popalign_core.reporting.report import render_report


def long_text_run():
    data = made_up.good_run()
    long = "Donaudampfschifffahrtsgesellschaft" * 6
    return replace(
        data,
        run_id=long,
        builder_id=long,
        prompts=[row | {"text": long} for row in data.prompts],
        sheets=[replace(sheet, row_labels=[long] * len(sheet.row_labels)) for sheet in data.sheets],
        decision=made_up.decision() | {"reason": long},
    )


STATES = {
    "long text": long_text_run,
    "good": made_up.good_run,
    "held": made_up.held_run,
    "half": made_up.half_run,
    "failed": made_up.failed_run,
    "empty group": made_up.empty_group_run,
    "bare": made_up.bare_run,
    "many prompts": made_up.many_prompts_run,
    "people": people_rows.run_with_people,
}


@cache
def rendered(state: str) -> str:
    return render_report(STATES[state]())


# The ratio of luminances of the text and of what lies behind it, for every element with text of its own.
CONTRASTS = """
() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
  };
  const luminance = (parts) => {
    const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [1, 1, 1, 1];
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || element.closest('.unseen, .skip, svg rect')) continue;
    const style = getComputedStyle(element);
    const text = rgba(element instanceof SVGElement ? style.fill : style.color);
    let under = behind(element);
    // A number on a bar: the part of the bar before it in the document lies under it.
    const part = element.previousElementSibling;
    if (part && part.classList.contains('part')) {
      const opacity = Number(part.getAttribute('fill-opacity'));
      const fill = rgba(getComputedStyle(part).fill);
      under = under.map((c, i) => (i < 3 ? c * (1 - opacity) + fill[i] * opacity : 1));
    }
    const [high, low] = [luminance(text.slice(0, 3)), luminance(under.slice(0, 3))].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), element.tagName + ': ' + element.textContent.trim().slice(0, 40)]);
  }
  return found;
}
"""


@pytest.mark.parametrize("state", STATES)
def test_no_complaint_and_no_request(open_report, state):
    opened = open_report(rendered(state))
    assert opened.complaints == []
    assert opened.requests == []
    assert "population disparity of run" in opened.page.title()


@pytest.mark.parametrize("state", ["good", "half", "bare"])
def test_headings_and_landmarks(open_report, state):
    page = open_report(rendered(state)).page
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map((e) => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(later - earlier for earlier, later in pairwise(levels)) <= 1
    for landmark in ("banner", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    assert page.get_by_role("navigation", name="Sections").count() == 1
    sections = page.locator("main > section").count()
    assert page.get_by_role("region").filter(has=page.locator("h2")).count() == sections >= 12
    assert page.eval_on_selector_all("img", "all => all.every((e) => e.alt && e.naturalWidth > 0)")


@pytest.mark.parametrize("width", [320, 390, 800])
@pytest.mark.parametrize("state", ["good", "long text", "people"])
def test_nothing_sticks_out_sideways(open_report, state, width):
    page = open_report(rendered(state), width=width).page
    page.eval_on_selector_all("details", "all => all.forEach((e) => { e.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider than the page scrolls by itself, and only such regions do.
    outside = page.evaluate(
        """() => [...document.body.querySelectorAll('*')]
            .filter((e) => !e.closest('.scrolling, .unseen, .skip, svg, thead'))
            .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []


def test_the_keyboard_reaches_everything(open_report):
    page = open_report(rendered("good")).page
    reached = []
    for _ in range(120):
        page.keyboard.press("Tab")
        what = page.evaluate(
            "(e => e === document.body ? '' : e.tagName + ' ' + (e.getAttribute('href') || e.getAttribute('aria-label')"
            " || e.textContent.trim()))(document.activeElement)"
        )
        if not what:
            break
        reached.append(what)
    assert reached[0] == "A #main"
    links = page.eval_on_selector_all("nav a", "all => all.map((e) => 'A ' + e.getAttribute('href'))")
    summaries = page.eval_on_selector_all("summary", "all => all.map((e) => 'SUMMARY ' + e.textContent.trim())")
    regions = page.eval_on_selector_all(
        ".scrolling",
        "all => all.filter((e) => !e.closest('details')).map((e) => 'DIV ' + e.getAttribute('aria-label'))",
    )
    assert len(links) == 14
    assert len(summaries) >= 6
    assert reached[: len(links) + 1] == [reached[0], *links]
    assert set(summaries) | set(regions) <= set(reached)
    summary = page.locator("summary", has_text="The exact configuration")
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("pre", has_text='"guidance_scale"').is_visible()
    page.locator("nav a", has_text="Decision").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#decision"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", ["good", "held", "failed", "people"])
def test_text_stands_out_in_light_and_dark(open_report, state, scheme):
    page = open_report(rendered(state), scheme=scheme).page
    page.eval_on_selector_all("details", "all => all.forEach((e) => { e.open = true; })")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [(round(ratio, 2), text) for ratio, text in contrasts if ratio < 4.5] == []
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)") == (scheme == "dark")


def test_before_and_after_differ_without_colour(open_report):
    page = open_report(rendered("good")).page
    fills = page.evaluate(
        """() => ['before', 'after'].map((side) => getComputedStyle(
            document.querySelector('#prompts td .mark.' + side)).fill)"""
    )
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert fills[0] == paper
    assert fills[1] != paper
    results = page.locator("#decision .result").all_inner_texts()
    assert set(results) == {"passed"}


@pytest.mark.parametrize("width", [390, 1280])
def test_pointing_at_a_picture_says_what_is_perceived_in_it(open_report, width):
    page = open_report(rendered("good"), width=width).page
    (sheet,) = made_up.good_run().sheets
    at_middles = page.eval_on_selector_all(
        ".pictures img",
        """(all) => all.map((image) => [...Array(8).keys()].map((column) => {
            image.scrollIntoView({block: 'center', behavior: 'instant'});
            const box = image.getBoundingClientRect();
            const x = box.left + (column + 0.5) * box.width / 8;
            return document.elementFromPoint(x, box.top + box.height / 2).title;
        }))""",
    )
    sides = [row for both in zip(sheet.before_perceived, sheet.after_perceived, strict=True) for row in both]
    assert [[title.split(": ", 1)[1] for title in row] for row in at_middles] == [list(row) for row in sides]


def test_a_number_is_read_with_its_row_and_column(open_report):
    page = open_report(rendered("good"), width=390).page
    table = page.get_by_role("table", name="mean over prompts that were not trained on").first
    assert table.get_by_role("columnheader").count() == 8
    row = table.get_by_role("row").filter(has=page.get_by_role("rowheader", name="Perceived gender", exact=True))
    assert row.get_by_role("cell").count() == 7


def test_paper_shows_what_is_folded(open_report):
    page = open_report(rendered("good")).page
    page.emulate_media(media="print")
    folded = page.eval_on_selector_all("details pre, details table", "all => all.map((e) => e.checkVisibility())")
    assert len(folded) >= 6
    assert all(folded)
    assert not page.get_by_role("navigation").is_visible()
