"""What the browser tests open: a page, and Prefect's interface."""

from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Page


@dataclass
class Opened:
    """A page and what it did: messages on the console, errors, and requests for anything but itself."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Site:
    """Where Prefect's interface is. deployment: id of debias/debias."""

    url: str
    workspace: Path
    deployment: str

    @property
    def form(self) -> str:
        return f"{self.url}/v2/deployments/deployment/{self.deployment}/run"
