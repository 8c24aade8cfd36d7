"""Rating pages in Chromium: by keyboard and by thumb, silent, on their own; the file they give is the one read."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import rating_pages as made_up
from test_report_browser import CONTRASTS

from popalign_core.raters.answers import read_answers, require_answered, require_page
from popalign_core.raters.audit import read_judgements
from popalign_core.raters.study import read_votes
from popalign_core.reporting.rating_page import RatingPage, render_rating_page

PAGES: dict[str, Callable[[], RatingPage]] = {"study": lambda: made_up.study_page()[0], "audit": made_up.audit_page}


@cache
def rendered(kind: str) -> str:
    return render_rating_page(PAGES[kind]())


def start(page, alias: str = "bat 7") -> None:
    page.fill("#alias", alias)
    page.press("#alias", "Enter")


def answer_all(page, key: str) -> None:
    while page.locator("#trial").is_visible():
        page.keyboard.press(key)


def saved(page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


@pytest.mark.parametrize(("kind", "key"), [("study", "ArrowLeft"), ("audit", "2")])
def test_by_keyboard_from_start_to_file(open_report, tmp_path, kind, key):
    opened = open_report(rendered(kind))
    page = opened.page
    start(page)
    answer_all(page, key)
    source = saved(page, tmp_path)
    assert source.name.endswith("-bat-7.json")
    file, made = read_answers(source), PAGES[kind]()
    require_page(file, made.kind, made.id, made.digest, source)
    require_answered(file, {(item.id, ask.id) for item in made.items for ask in item.asks}, False, source)
    assert file.complete
    assert file.alias == "bat 7"
    if kind == "study":
        assert {answer.choice for answer in file.answers} == {answer.left for answer in file.answers} != {""}
        assert len(read_votes(made_up.study_page()[1], file.answers)) == len(file.answers)
    else:
        assert {one.group for one in read_judgements(file.answers)} == {"woman", "medium-light"}
    assert opened.complaints == []
    assert opened.requests == []


def test_repeats_come_last_and_every_question_once(open_report, tmp_path):
    page = open_report(rendered("study")).page
    start(page)
    answer_all(page, "ArrowDown")
    given = [answer.item for answer in read_answers(saved(page, tmp_path)).answers]
    assert len(given) == len(set(given))
    last = [item.id for item in made_up.study_page()[0].items if item.last]
    assert set(given[-len(last) :]) == set(last)


def test_raters_have_orders_of_their_own_and_see_both_arrangements(open_report):
    page = open_report(rendered("study")).page
    seen = set()
    for alias in "abcdefgh":
        start(page, alias)
        seen.add(page.locator("#choices button").first.get_attribute("data-value"))
        page.reload()
    assert len(seen) > 2


def test_what_was_answered_waits_after_a_reload(open_report):
    page = open_report(rendered("study")).page
    start(page)
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    before = page.locator("#choices button").first.get_attribute("data-value")
    page.reload()
    assert page.input_value("#alias") == "bat 7"
    page.click("#begin-button")
    assert page.locator("#count").inner_text() == "4 of 16"
    assert page.locator("#choices button").first.get_attribute("data-value") == before
    page.keyboard.press("Backspace")
    assert page.locator('#choices [aria-pressed="true"]').inner_text().startswith("B")
    page.click("#pause")
    assert "3 of 16 answered" in page.locator("#end").inner_text()
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#forget")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('popalign:')).length") == 0


def test_stopping_early_gives_an_incomplete_file(open_report, tmp_path):
    page = open_report(rendered("study")).page
    start(page)
    page.keyboard.press("ArrowDown")
    page.click("#pause")
    file = read_answers(saved(page, tmp_path))
    assert (file.complete, len(file.answers), file.answers[0].choice) == (False, 1, "tie")
    assert read_answers(_written(tmp_path, page.input_value("#text"))) == file


def _written(folder: Path, text: str) -> Path:
    path = folder / "copied.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_no_person_answers_all_questions_of_a_picture(open_report):
    page = open_report(rendered("audit")).page
    start(page)
    page.keyboard.press("n")
    assert page.locator("#count").inner_text() == "3 of 6"


@pytest.mark.parametrize("alias", ["", "<b>", "-x", "a" * 41])
def test_an_alias_that_cannot_be_stored_is_refused(open_report, alias):
    page = open_report(rendered("study")).page
    page.evaluate("alias => { document.getElementById('alias').value = alias; }", alias)
    page.click("#begin-button")
    if len(alias) <= 40:
        assert page.locator("#alias-error").inner_text().startswith("Letters")
        assert page.locator("#start").is_visible()


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390), (1280, 800)])
@pytest.mark.parametrize("kind", PAGES)
def test_everything_fits_the_screen(open_report, kind, width, height):
    page = open_report(rendered(kind), width=width).page
    page.set_viewport_size({"width": width, "height": height})
    for screen in ("start", "trial", "end"):
        if screen == "trial":
            start(page)
            # The picture, the question and every answer at once: nobody scrolls to vote.
            bottom = page.locator("#choices button").last.bounding_box()
            assert bottom["y"] + bottom["height"] <= height
            assert page.evaluate("document.documentElement.scrollHeight") <= height
            sizes = page.eval_on_selector_all(
                "#choices button", "all => all.map((e) => e.getBoundingClientRect().height)"
            )
            assert min(sizes) >= 40
            overlaps = page.evaluate(
                """() => { const top = document.querySelector('#choices').getBoundingClientRect().top;
                return [...document.querySelectorAll('#options img')].map((e) => e.getBoundingClientRect())
                    .filter((box) => box.bottom > top + 1 || box.width < 16).length; }"""
            )
            assert overlaps == 0
        elif screen == "end":
            page.click("#pause")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(f"#{screen}").is_visible()


def test_a_thumb_can_vote(open_report):
    page = open_report(rendered("study"), width=390).page
    page.fill("#alias", "thumb")
    page.click("#begin-button")
    page.get_by_role("button", name="No difference").click()
    assert page.locator("#count").inner_text() == "2 of 16"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", PAGES)
def test_text_stands_out(open_report, kind, scheme):
    page = open_report(rendered(kind), scheme=scheme).page
    found = page.evaluate(CONTRASTS)
    start(page)
    page.keyboard.press("x")
    page.keyboard.press("ArrowLeft")
    shown = "#trial:not([hidden]) *"
    found += page.evaluate(CONTRASTS)
    assert page.locator(shown).count() > 10
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


def test_the_keyboard_reaches_every_control_and_pictures_are_named(open_report):
    page = open_report(rendered("study")).page
    start(page)
    page.keyboard.press("ArrowLeft")
    reached = []
    page.focus("#back")
    page.keyboard.press("Shift+Tab")
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.innerText.trim()"))
    assert [text.split("\n")[0] for text in reached[:2]] == ["\u2190 Back", "Stop"]
    assert [text[:1] for text in reached[2:]] == ["A", "N", "B"]
    names = page.eval_on_selector_all("#options img", "all => all.map((e) => e.alt)")
    assert names[0].startswith("Side A, picture 1 of")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"


def test_the_page_tells_neither_model_nor_sample():
    html = rendered("study")
    for word in ("base", "round-1", "aligned", "p1/", "sample"):
        assert f'"{word}' not in html
    assert "base/p1" not in html
    assert "repeat" not in html.replace("repeat(", "").split('id="data">')[1].split("</script>")[0]
