"""Progress of long work: a bar where a terminal watches, and a progress artifact on the run's page in Prefect."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from uuid import UUID

import httpx
from prefect.artifacts import ProgressArtifact
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.run_page import show, show_progress

# An update costs the server about 10 ms and three rows.
SECONDS_BETWEEN_UPDATES = 5.0
_terminal: list[Progress] = []
_known: dict[str, "Work"] = {}


@dataclass
class Work:
    """Work that was announced. total, done: in `unit`; seconds are those of this process's clock."""

    name: str
    total: int
    unit: str
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    shown: float = 0.0
    bar: TaskID | None = None
    artifact: UUID | None = None

    @property
    def rate(self) -> float:
        """Mean since it was announced, units a second."""
        return self.done / max(time.monotonic() - self.started, 1e-3)

    def describe(self) -> str:
        """How far it is, how fast it goes, and how long it will take."""
        text = f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"
        if self.done and self.done < self.total:
            text += f", {self.rate:.3g}/s, {_duration((self.total - self.done) / self.rate)} left"
        elif self.done:
            text += f" in {_duration(time.monotonic() - self.started)}, {self.rate:.3g}/s"
        return text


@contextmanager
def terminal_progress() -> Generator[None]:
    """Shows bars for everything announced inside; the command line switches it on, a worker does not."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, TimeElapsedColumn()) as progress:
        _terminal.append(progress)
        try:
            yield
        finally:
            _terminal.clear()
            _known.clear()


def expect(name: str, total: int, unit: str) -> None:
    """Announces work of the flow run that this is called in: how much it will come to."""
    work = _known[name] = Work(name, total, unit)
    if _terminal:
        work.bar = _terminal[0].add_task(name, total=total, rate="")
    # The page of a run is worth less than the run: a server that does not answer stops no work.
    with suppress(httpx.HTTPError):
        work.artifact = show(ProgressArtifact(progress=0.0, description=work.describe()))


@contextmanager
def progress_of(name: str) -> Generator[Callable[[int], None]]:
    """Gives a function that reports finished items of announced work; of any other it does nothing."""
    yield lambda count: report_progress(name, count)


def report_progress(name: str, count: int) -> None:
    """So many more items are finished."""
    work = _known.get(name)
    if work is None or not count:
        return
    work.done += count
    if work.bar is not None and _terminal:
        # Not rich's own speed, which falls to 0 once a bar is full.
        _terminal[0].update(work.bar, advance=count, rate=f"{work.rate:6.1f}/s")
    now = time.monotonic()
    if work.artifact is not None and (work.done >= work.total or now - work.shown >= SECONDS_BETWEEN_UPDATES):
        work.shown = now
        percent = min(100.0, 100 * work.done / max(work.total, 1))
        with suppress(httpx.HTTPError):
            show_progress(work.artifact, percent, work.describe())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
