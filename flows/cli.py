"""The command line, with the commands of `*_cli.py`. `--help` loads neither torch nor Prefect."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.axes_cli import axis
from flows.comparison_cli import compare_samplers
from flows.in_process import quiet_prefect, split_execution, without_heartbeat
from flows.people_cli import audit, study
from flows.registry_cli import export, models, promote, rollback
from flows.retention_cli import gc, plan
from flows.scorers_cli import scorers
from flows.services_cli import down, setup, up
from flows.tables_cli import catalog, migrate, show, sql

if TYPE_CHECKING:
    from popalign_core.execution import Execution
    from popalign_core.presets import PresetName
    from tasks.resume import RunStart
    from tasks.summary import RunSummary

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measures and reduces population-level disparity in text-to-image models.",
)
console = Console()
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
    quiet_prefect()
    from popalign_core.execution import Execution
    from popalign_core.presets import chosen_config
    from tasks.resume import RunStart

    started = RunStart(f"demo-{seed}", "emoji", chosen_config("emoji", [f"seed={seed}"], None))
    _execute(started, workspace, Execution(), "the same command")


@app.command()
def run(
    preset: Annotated[str, typer.Argument(help="emoji, sdxl or sdxl-paper; not with --resume.")] = "",
    run_id: Annotated[str, typer.Option(help="Names the run; the same id continues it.")] = "",
    workspace: WorkspaceOption = Path("workspace"),
    settings: SetOption = None,
    resume: Annotated[str, typer.Option(help="A run id, or latest: goes on with what was started last.")] = "",
) -> None:
    """Runs a preset from prompts to decision; the same run id goes on where it stopped.

    With --resume, --set changes where the work is done (execution) and what saves memory in training
    (alignment.micro_batch, alignment.gradient_checkpointing), and nothing else.
    """
    quiet_prefect()
    from popalign_core.errors import InvalidInput
    from popalign_core.presets import chosen_config
    from tasks.resume import RunStart, started_run

    changes, execution = split_execution(settings or [])
    if resume:
        if preset or run_id:
            raise InvalidInput("--resume goes on with preset and run id of the run: leave both out.")
        started = started_run(str(workspace), resume, changes)
    elif not preset:
        raise InvalidInput("which preset? emoji, sdxl or sdxl-paper; or --resume latest.")
    else:
        # A default id holds the date: after midnight the same command would begin another run.
        run_id = run_id or f"{preset}-{time.strftime('%Y%m%d')}"
        started = RunStart(run_id, preset, chosen_config(preset, changes, None))
    again = " ".join([f"--resume {started.run_id}", *(f"--set {change}" for change in changes if resume)])
    _execute(started, workspace, execution, f"popalign run {again} with the same workspace")


@app.command()
def status(workspace: WorkspaceOption = Path("workspace")) -> None:
    """Shows what `popalign up` runs here, and the runs of a workspace and how far each got."""
    from flows.services import services_status
    from storage.layout import Workspace
    from tasks.summary import run_states

    if services := services_status():
        running = Table("process", "pid", "state", "detail")
        for service in services:
            running.add_row(service.what, service.pid, service.state, escape(service.detail))
        console.print(running)
    table = Table("run", "images", "models", "throughput", "decision")
    for row in run_states(Workspace.open(workspace)):
        table.add_row(*row)
    console.print(table)


@app.command()
def report(run_id: str, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Writes the HTML report of a run again."""
    from storage.layout import Workspace
    from tasks.reporting import write_report
    from tasks.run import run_config

    place = Workspace.open(workspace)
    console.print(str(write_report.fn(str(place.root), run_id, run_config(str(place.root), run_id))))


@app.command()
def trend(
    last: Annotated[int, typer.Option(min=0, help="Only the last so many runs; 0 = all.")] = 0,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Writes an HTML page that compares the workspace's runs over time."""
    from storage.layout import Workspace
    from tasks.trend import write_trend

    console.print(str(write_trend(str(Workspace.open(workspace).root), last)))


for _command in (
    sql,
    show,
    plan,
    compare_samplers,
    up,
    down,
    setup,
    models,
    promote,
    rollback,
    export,
    gc,
    migrate,
    axis,
):
    app.command()(_command)
app.add_typer(catalog, name="catalog")
app.add_typer(study, name="study")
app.add_typer(audit, name="audit")
app.add_typer(scorers, name="scorers")


def _execute(started: "RunStart", workspace: Path, execution: "Execution", again: str) -> None:
    from storage.layout import Workspace
    from storage.locks import run_lock
    from tasks.inputs import check_inputs
    from tasks.memory_plan import STAGES, require_memory

    # What can be refused is refused before Prefect's server starts.
    check_inputs(started.config)
    if execution.placement in ("auto", "process"):
        require_memory(started.config, execution, *STAGES)
    with run_lock(Workspace.open(workspace), started.run_id):
        pass
    from flows.debias import debias
    from flows.outcome import summary_of
    from tasks.progress import terminal_progress

    place = str(workspace.absolute())
    console.print(f"run [bold]{started.run_id}[/] in {escape(place)} (stop with Ctrl-C; {escape(again)} goes on)")
    clock = time.monotonic()
    with terminal_progress():
        state = without_heartbeat(
            lambda: debias(
                started.run_id,
                cast("PresetName", started.preset),
                config=started.config,
                workspace=place,
                execution=execution,
                return_state=True,
            )
        )
    _show(summary_of(state), workspace)
    console.print(f"{time.monotonic() - clock:.0f} s")


def _show(summary: "RunSummary", workspace: Path) -> None:
    table = Table("held-out neutral prompts", "before", "after", "ratio")
    for row in summary.headline:
        table.add_row(*row)
    console.print(table)
    console.print(f"[bold]{summary.verdict}[/]: {escape(summary.reason)}")
    console.print(f"report: {escape(summary.report)}")
    console.print(f'tables: popalign sql -w {escape(str(workspace))} "FROM comparisons"')


if __name__ == "__main__":
    main()
