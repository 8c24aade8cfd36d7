"""Prefect's interface as an operator sees it, on what `popalign up` starts: the form, the run's page, its artifacts."""

import inspect
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from pages import Opened, Site
from PIL import Image
from playwright.sync_api import Page, expect
from pydantic import BaseModel

from popalign_core.config import AlignmentConfig, AxisName, RunConfig, SamplingConfig
from popalign_core.execution import AUTO, Execution
from popalign_core.presets import PresetName, preset
from storage.catalog import query
from storage.layout import Workspace

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
expect.set_options(timeout=30_000)  # a busy machine needs more than the default of 5 s

RUN = "from-the-form"
SETTINGS = (
    "expansion.axes=perceived_gender expansion.max_subjects=2 sampling.steps=2 sampling.batch_size=16 "
    "sampling.shard_size=32 images.train_neutral=12 images.validation=1 images.evaluation=10 images.trained=1 "
    "images.obedience=1 populations.weighting=even alignment.rounds=1 alignment.steps=2 alignment.pairs_per_step=2 "
    "assessment.resamples=200 assessment.min_reduction=0.9 assessment.max_obedience_drop=1 "
    "assessment.max_score_drop=1 assessment.max_unknown_rise=1"
).split()
ENDED = re.compile("^(Held|QualityGateFailed|Completed|Failed|Crashed|Cancelled|TimedOut)$")
SECONDS_TO_THE_END = 600
GREEN = (35, 158, 76)  # of a stage that is completed, in the graph

# Title, help and value of every field, in the form's order. A value of rows or chips is a list.
FIELDS = """
() => [...document.querySelectorAll('main label')]
  .filter((label) => label.textContent.endsWith(' (Optional)'))
  .map((label) => {
    const control = document.getElementById(label.htmlFor);
    const box = label.closest('.group').querySelector('fieldset');
    const rows = [...box.querySelectorAll('textarea')].map((row) => row.value);
    const chips = [...box.querySelectorAll('[aria-label^="Remove "]')].map((chip) =>
      chip.getAttribute('aria-label').slice('Remove '.length, -' tag'.length));
    const value = !control ? rows : control.textContent === 'Select' ? chips :
      control.getAttribute('aria-checked') ?? (control.value || control.textContent);
    const help = label.nextElementSibling;
    return [label.textContent.slice(0, -' (Optional)'.length), help ? help.textContent : '', value];
  })
"""


@pytest.fixture
def opened(
    site: Site,  # noqa: ARG001 - pages are opened while it runs
    open_site: Callable[[str], Opened],
) -> Iterator[Callable[[str], Opened]]:
    """Opens pages that must not complain, but for what a test takes out of `complaints`."""
    pages: list[Opened] = []

    def open_page(url: str) -> Opened:
        pages.append(open_site(url))
        return pages[-1]

    yield open_page
    for page in pages:
        assert page.complaints == []
        assert {urlsplit(url).hostname for url in page.requests} <= {"sr-client-cfg.amplitude.com"}


@pytest.fixture(scope="module")
def finished(site: Site, open_site: Callable[[str], Opened]) -> str:
    """Starts the smallest run by the form, and waits on its page until it ends. Returns: the page's address."""
    opened = open_site(site.form)
    page = opened.page
    page.get_by_role("textbox", name="run_id (Optional)").fill(RUN)
    page.get_by_role("tab", name="None").first.click()
    for number, setting in enumerate(SETTINGS):
        page.get_by_role("button", name="Add item").click()
        field(page, "settings").get_by_role("textbox").nth(number).fill(setting)
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("region", name="Notifications").get_by_role("link", name="View run").click()
    state = page.get_by_role("main").get_by_text(ENDED).first
    expect(state).to_be_visible(timeout=SECONDS_TO_THE_END * 1000)
    assert state.inner_text() == "Held", _of_run(site, page)
    assert opened.complaints == []
    return page.url.split("?")[0]


def _of_run(site: Site, page: Page) -> Any:
    run = page.url.split("?")[0].rsplit("/", 1)[1]
    return httpx.get(f"{site.url}/api/flow_runs/{run}").json()["state"]


def field(page: Page, name: str) -> Any:
    """The box of a field of the form."""
    label = page.locator("label", has_text=re.compile(rf"^{re.escape(name)} \(Optional\)$"))
    return page.locator(".group").filter(has=label).last.locator("fieldset").first


def fields(model: type[BaseModel], values: BaseModel) -> Iterator[tuple[str, str, Any]]:
    """Title, help and value of every field as the form is to show them; None = any value, since fields follow."""
    for name, info in model.model_fields.items():
        kind, value = info.annotation, getattr(values, name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield str(info.title), info.description or inspect.getdoc(kind) or "", None
            yield from fields(kind, value)
        else:
            yield str(info.title), info.description or "", shown(value)


def shown(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return list(value)
    if value is None:
        return None
    return value if isinstance(value, str) else f"{value:g}"


def follow(opened: Opened, name: str) -> None:
    """Opens a link's address: Prefect's graph throws where a click leaves its page before it is drawn."""
    address = opened.page.get_by_role("link", name=name).first.get_attribute("href")
    assert address is not None
    opened.page.goto(urljoin(opened.page.url, address))


def options(page: Page, name: str) -> list[str]:
    """What a dropdown offers."""
    page.get_by_role("button", name=f"Select {name}", exact=True).click()
    page.get_by_role("option").first.wait_for()
    found = page.get_by_role("option").all_inner_texts()
    page.keyboard.press("Escape")
    expect(page.get_by_role("option")).to_have_count(0)
    return found


def test_the_form_says_what_every_field_is_and_holds_the_preset(
    site: Site, opened: Callable[[str], Opened], screenshot: Callable[[Page, str], None]
) -> None:
    page = opened(f"{site.url}/v2/deployments/deployment/{site.deployment}").page
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    resamples = page.get_by_role("spinbutton", name="Bootstrap resamples (Optional)")
    expect(resamples).to_have_value("2000")
    screenshot(page, "form")

    found = [tuple(row) for row in page.evaluate(FIELDS)]
    names = ["run_id", "preset_name", "settings", "config", "workspace", "execution"]
    assert [title for title, _, _ in found if title in names] == names
    assert all(help for title, help, _ in found if title in names)
    assert {title: value for title, _, value in found if title in names[:3]} == {
        "run_id": "emoji-0", "preset_name": "emoji", "settings": [],
    }  # fmt: skip
    expected = [*fields(RunConfig, preset("emoji")), *fields(Execution, AUTO)]
    inner = [row for row in found if row[0] not in names]
    assert [row[:2] for row in inner] == [row[:2] for row in expected]
    assert len(expected) > 60
    wrong = [(row, value) for row, (_, _, value) in zip(inner, expected, strict=True) if value not in (None, row[2])]
    assert wrong == []


def test_the_form_offers_what_there_is_to_choose_from(site: Site, opened: Callable[[str], Opened]) -> None:
    page = opened(site.form).page
    for name, kind in {
        "preset_name": PresetName,
        "Scheduler": SamplingConfig.model_fields["scheduler"].annotation,
        "Axes": AxisName,
        "Objective": AlignmentConfig.model_fields["objective"].annotation,
        "Placement": Execution.model_fields["placement"].annotation,
    }.items():
        assert options(page, name) == list(get_args(kind))


def test_a_wrong_value_is_refused_by_name(site: Site, opened: Callable[[str], Opened]) -> None:
    form = opened(site.form)
    page = form.page
    page.get_by_role("spinbutton", name="Steps (Optional)", exact=True).fill("0")
    page.get_by_role("button", name="Submit").click()
    notice = page.get_by_role("region", name="Notifications").get_by_role("listitem")
    expect(notice).to_contain_text("config.sampling.steps")
    expect(notice).to_contain_text("minimum")
    assert page.url.split("?")[0] == site.form
    refused, logged = form.complaints
    assert "409" in refused
    assert "config.sampling.steps" in logged
    form.complaints.clear()


def test_the_page_of_a_run_shows_its_stages_and_why_it_is_held(
    finished: str, opened: Callable[[str], Opened], screenshot: Callable[[Page, str], None]
) -> None:
    run = opened(f"{finished}?tab=Artifacts")
    page = run.page
    main = page.get_by_role("main")
    for text in (f"debias {RUN}", "Held", "model:emoji", "preset:emoji"):
        expect(main.get_by_text(text, exact=True).first).to_be_visible()
    for what in ("summary", "disparities"):
        expect(page.get_by_role("link", name=f"popalign-{RUN}-{what}")).to_be_visible()
    _wait_for_graph(page)
    screenshot(page, "run")

    page.get_by_role("tab", name="Subflow Runs").click()
    for stage in ("expansion", "alignment", "assessment"):
        listed = page.get_by_role("tabpanel").get_by_role("listitem").filter(has_text=f"{stage} {RUN}").first
        expect(listed).to_contain_text("Completed")
    page.get_by_role("tab", name="Details").click()
    expect(page.get_by_role("tabpanel", name="Details")).to_contain_text("at least 0.9 is needed")


def _wait_for_graph(page: Page) -> None:
    """Until the graph shows completed stages, a hundredth of it or more."""
    for _ in range(60):
        with Image.open(BytesIO(page.locator("canvas").first.screenshot())) as image:
            pixels = image.convert("RGB")
        near = sum(
            count
            for count, colour in pixels.getcolors(pixels.width * pixels.height) or []
            if max(abs(a - b) for a, b in zip(colour, GREEN, strict=True)) < 12  # type: ignore[arg-type]
        )
        if near > 0.005 * pixels.width * pixels.height:
            return
        page.wait_for_timeout(500)
    raise AssertionError("the graph shows no completed stage")


def test_a_stage_shows_how_far_it_is(finished: str, opened: Callable[[str], Opened]) -> None:
    run = opened(finished)
    for stage in (f"assessment {RUN} round-1", f"sampling {RUN} round-1 evaluation"):
        run.page.get_by_role("tab", name="Subflow Runs").click()
        follow(run, stage)
    run.page.get_by_role("tab", name="Artifacts").click()
    progress = run.page.get_by_role("link", name=re.compile("PROGRESS"))
    expect(progress).to_contain_text("sampling round-1 evaluation: 20 of 20 images in")
    expect(progress).to_contain_text("/s")


def test_the_summary_shows_the_decision_and_images_before_and_after(
    site: Site, finished: str, opened: Callable[[str], Opened], screenshot: Callable[[Page, str], None]
) -> None:
    page = _artifact(opened(f"{finished}?tab=Artifacts"), "summary")
    expect(page.get_by_role("heading", name=re.compile("^hold: perceived gender reduction is"))).to_be_visible()
    expect(page.get_by_role("row").filter(has_text="perceived gender disparity (L2)")).to_be_visible()
    for name in ("base", "round-1"):
        picture = page.get_by_role("img", name=name, exact=True)
        expect(picture).to_be_visible()
        assert picture.evaluate("(image) => image.complete && image.naturalWidth > 0")
    report = Path(page.locator("main code").first.inner_text())
    assert report.is_file()
    assert report.is_relative_to(site.workspace)
    screenshot(page, "artifact")


def test_the_table_shows_the_numbers_of_the_catalog(site: Site, finished: str, opened: Callable[[str], Opened]) -> None:
    page = _artifact(opened(f"{finished}?tab=Artifacts"), "disparities")
    expect(page.get_by_role("row")).to_have_count(5)
    titles, *rows = [row.locator("th, td").all_inner_texts() for row in page.get_by_role("row").all()]
    table = [dict(zip(titles, row, strict=True)) for row in rows]
    assert {"95% interval", "sampling floor", "judge"} <= set(titles)
    wanted = query(
        Workspace.open(site.workspace),
        """SELECT model_id, measure, round(value, 4) AS value, n FROM disparities
        WHERE split = 'eval' AND level = 'mean' AND measure IN ('l2', 'total_variation')""",
    ).to_pylist()
    shown_rows = {(row["model"], row["measure"], float(row["value"]), int(row["n"])) for row in table}
    assert shown_rows == {(row["model_id"], row["measure"], row["value"], row["n"]) for row in wanted}


def _artifact(run: Opened, what: str) -> Page:
    """From a run's page to one of its artifacts, by way of the list of its versions."""
    follow(run, f"popalign-{RUN}-{what}")
    version = run.page.locator('main a[href*="/artifacts/artifact/"]').first
    version.wait_for()
    version.click()
    run.page.get_by_role("tabpanel", name="Artifact").get_by_role("table").wait_for()
    return run.page
