"""Chromium for the tests of the report, and the made-up rows that tests/core uses as well."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

sys.path.append(str(Path(__file__).parents[1] / "core"))


@dataclass
class Opened:
    """A page and what it did: messages on the console, errors, and requests for anything but itself."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


# Not the session's: until Playwright ends, its event loop counts as running in the thread of all later tests, and
# asyncio.run() is refused there.
@pytest.fixture(scope="module")
def browser(chromium_path: str) -> Iterator[Browser]:
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium_path, args=options)
        yield launched
        launched.close()


@pytest.fixture
def open_report(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Opens HTML text from a file, without a network."""
    contexts: list[BrowserContext] = []

    def opened(html: str, width: int = 1280, scheme: Literal["light", "dark"] = "light") -> Opened:
        path = tmp_path / "report.html"
        path.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        found = Opened(context.new_page())
        found.page.on("console", lambda message: found.complaints.append(message.text))
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.goto(path.as_uri(), wait_until="load")
        found.requests = [url for url in found.requests if url != path.as_uri() and not url.startswith("data:")]
        return found

    yield opened
    for context in contexts:
        context.close()
