"""Progress of long work: a bar where a terminal watches, silence elsewhere."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_active: dict[str, Progress] = {}
_totals: dict[str, int] = {}


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
        _active["terminal"] = progress
        try:
            yield
        finally:
            _active.clear()
            _totals.clear()


def expect(description: str, total: int) -> None:
    """Announces how much a description will come to."""
    _totals[description] = total
    if progress := _active.get("terminal"):
        progress.add_task(description, total=total, rate="")


@contextmanager
def progress_of(description: str) -> Generator[Callable[[int], None]]:
    """Gives a function that reports finished items."""
    progress = _active.get("terminal")
    known = {task.description: task for task in progress.tasks} if progress else {}

    def advance(count: int) -> None:
        if progress and description in known:
            task = known[description]
            # The mean since it was announced: rich's own speed falls to 0 once a bar is full.
            rate = (task.completed + count) / max(task.elapsed or 0.0, 1e-3)
            progress.update(task.id, advance=count, rate=f"{rate:6.1f}/s")

    yield advance
