"""The command line: `popalign demo | run | plan | status | sql | report`. `--help` loads neither torch nor Prefect."""

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from popalign_core.config import RunConfig
    from popalign_core.presets import PresetName

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measures and reduces population-level disparity in text-to-image models.",
)
console = Console()
T = TypeVar("T")
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="stage.field=value, as often as needed.")]


def main() -> None:
    """Entry point: an error that a user can act on is one message and exit code 2, without a traceback."""
    from storage.errors import StorageError

    try:
        app()
    except StorageError as error:
        _fail(str(error))
    except Exception as error:
        from popalign_core.errors import PopalignError

        if not isinstance(error, PopalignError):
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    Console(stderr=True).print(f"[bold]popalign:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


@app.command()
def demo(workspace: WorkspaceOption = Path("workspace"), seed: int = 0) -> None:
    """Runs everything on the embedded emoji model without a network or a GPU."""
    _execute("emoji", f"demo-{seed}", workspace, [f"seed={seed}"])


@app.command()
def run(
    preset: Annotated[str, typer.Argument(help="emoji, sdxl or sdxl-paper.")],
    run_id: Annotated[str, typer.Option(help="Names the run; the same id continues it.")] = "",
    workspace: WorkspaceOption = Path("workspace"),
    settings: SetOption = None,
) -> None:
    """Runs a preset from prompts to decision; the same run id goes on where it stopped."""
    # A default id holds the date: after midnight the same command would begin another run.
    run_id = run_id or f"{preset}-{time.strftime('%Y%m%d')}"
    _execute(preset, run_id, workspace, settings or [], again=f"the same with --run-id {run_id}")


@app.command()
def plan(preset: str, settings: SetOption = None) -> None:
    """Shows what a run would draw and train, without doing it."""
    from tasks.plan import planned_work

    table = Table("stage", "what", "how many")
    for row in planned_work(_config(preset, settings or [])):
        table.add_row(*row)
    console.print(table)


@app.command()
def status(workspace: WorkspaceOption = Path("workspace")) -> None:
    """Lists the runs of a workspace and how far each got."""
    from storage.layout import Workspace
    from tasks.summary import run_states

    table = Table("run", "images", "models", "decision")
    for row in run_states(Workspace.open(workspace)):
        table.add_row(*row)
    console.print(table)


@app.command()
def sql(query: str, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Runs a read-only DuckDB query over all committed tables."""
    from storage.catalog import query as run_query
    from storage.catalog import rebuild_catalog
    from storage.layout import Workspace

    place = Workspace.open(workspace)
    rebuild_catalog(place)
    found = run_query(place, query)
    table = Table(*map(escape, found.column_names))
    for row in found.to_pylist():
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
    console.print(table)


@app.command()
def report(run_id: str, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Writes the HTML report of a run again."""
    from storage.layout import Workspace
    from tasks.reporting import write_report
    from tasks.run import run_config

    place = Workspace.open(workspace)
    console.print(str(write_report.fn(str(place.root), run_id, run_config(str(place.root), run_id))))


def _config(preset: str, settings: list[str]) -> "RunConfig":
    from popalign_core.config import with_settings
    from popalign_core.errors import InvalidInput
    from popalign_core.presets import preset as preset_named

    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidInput(f"--set {setting!r} has no '=': write stage.field=value.")
        pairs[key] = value
    return with_settings(preset_named(preset), pairs)


def _execute(preset: str, run_id: str, workspace: Path, settings: list[str], again: str = "") -> None:
    _quiet_prefect()
    from storage.layout import Workspace
    from storage.locks import run_lock
    from tasks.inputs import check_inputs

    config = _config(preset, settings)
    # What can be refused is refused before Prefect's server starts.
    check_inputs(config)
    with run_lock(Workspace.open(workspace), run_id):
        pass
    from flows.debias import debias
    from tasks.progress import terminal_progress

    place = escape(str(workspace.absolute()))
    console.print(f"run [bold]{run_id}[/] in {place} (stop with Ctrl-C; {again or 'the same command'} goes on)")
    started = time.monotonic()
    with terminal_progress():
        summary = _without_heartbeat(
            lambda: debias(run_id, cast("PresetName", preset), str(workspace.absolute()), config)
        )
    table = Table("held-out neutral prompts", "before", "after", "ratio")
    for row in summary.headline:
        table.add_row(*row)
    console.print(table)
    console.print(f"[bold]{summary.verdict}[/]: {escape(summary.reason)}")
    console.print(f"report: {escape(summary.report)}")
    console.print(f'tables: popalign sql -w {escape(str(workspace))} "FROM comparisons"')
    console.print(f"{time.monotonic() - started:.0f} s")


def _quiet_prefect() -> None:
    """Before anything is imported that reads these: tqdm does, and torch imports it.

    The terminal shows progress bars; Prefect's log stays in its user interface.
    """
    # CRITICAL: an error is shown once, by main(), and not as a traceback of every flow above it.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # A busy machine takes longer than the 20 s that Prefect waits for its own server.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _without_heartbeat(call: Callable[[], T]) -> T:
    """In one process nobody watches a heartbeat, and joining its thread costs a second a flow."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        return call()
