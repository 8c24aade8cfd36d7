"""Chromium for the tests of the report and of Prefect's interface, and the made-up rows that tests/core uses."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import httpx
import pytest
from pages import Opened, Site
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Route, sync_playwright

from flows.stopping import marked

sys.path.append(str(Path(__file__).parents[1] / "core"))

ROOT = Path(__file__).parents[2]
ELSEWHERE = re.compile(r"^\w+://(?!127\.0\.0\.1[:/])")
# What Prefect 3.8's interface itself does wrong on any server, by address and text of the message.
FLAWS_OF_PREFECT = (
    # It calls a host of analytics, whatever the server's settings say; `open_site` lets nothing out.
    (r"https://sr-client-cfg\.amplitude\.com/", "Failed to load resource"),
    # It looks for the icons of the browser's tab beside /v2 instead of in it.
    (r"http://127\.0\.0\.1:\d+/favicon[-\w]*\.(ico|png)$", "404"),
    (r"http://127\.0\.0\.1:\d+/(scheduled|pending|running|completed|failed|crashed|cancelled)\.svg$", "404"),
    # On the page of an artifact that no task made, it asks for the task of id "".
    (r"http://127\.0\.0\.1:\d+/api/task_runs/filter$", "422"),
)


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


@pytest.fixture(scope="module")
def open_site(browser: Browser) -> Iterator[Callable[[str], Opened]]:
    """Opens an address of this machine. complaints: errors but for Prefect's own flaws; requests: to other hosts."""
    contexts: list[BrowserContext] = []

    def opened(url: str) -> Opened:
        context = browser.new_context(
            viewport={"width": 1280, "height": 900}, locale="en-US", timezone_id="UTC", color_scheme="light"
        )
        contexts.append(context)
        found = Opened(context.new_page())

        def refuse(route: Route) -> None:
            found.requests.append(route.request.url)
            route.abort()

        def listen(message: ConsoleMessage) -> None:
            where = message.location["url"]
            flaw = any(re.match(url, where) and text in message.text for url, text in FLAWS_OF_PREFECT)
            if message.type == "error" and not flaw:
                found.complaints.append(f"{message.text} ({where})")

        context.route(ELSEWHERE, refuse)
        found.page.on("console", listen)
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.goto(url, wait_until="load")
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    root = tmp_path_factory.mktemp("operator")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "flows.services_cli"]
    up = [*command, "up", "--detach", "--workspace", str(root / "workspace"), "--port", port]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(root / "home"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        try:
            done = subprocess.run(up, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done
            url = f"http://127.0.0.1:{port}"
            # In the night it would take the worker for many minutes.
            nightly = _deployment(url, "nightly/debias-nightly")
            httpx.post(f"{url}/api/deployments/{nightly}/pause_deployment").raise_for_status()
            _wait_for_worker(url)
            yield Site(url, root / "workspace", _deployment(url, "debias/debias"))
        finally:
            subprocess.run([*command, "down"], cwd=ROOT, capture_output=True, check=True)
        assert not marked()


def _wait_for_worker(url: str, seconds: float = 120) -> None:
    """Until the queue is shown as served."""
    deadline = time.monotonic() + seconds
    while httpx.get(f"{url}/api/work_pools/popalign-cpu/queues/default").json()["status"] != "READY":
        assert time.monotonic() < deadline, f"no worker has asked for work within {seconds:.0f} s"
        time.sleep(0.5)


def _deployment(url: str, name: str) -> str:
    return str(httpx.get(f"{url}/api/deployments/name/{name}").raise_for_status().json()["id"])


@pytest.fixture(scope="session")
def screenshot() -> Callable[[Page, str], None]:
    """Keeps what a page shows in the folder that POPALIGN_SCREENSHOTS names, if any, in 256 colours: docs/figures."""

    def keep(page: Page, name: str) -> None:
        if folder := os.environ.get("POPALIGN_SCREENSHOTS"):
            with Image.open(BytesIO(page.screenshot())) as image:
                few = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(Path(folder) / f"{name}.png", optimize=True)

    return keep
