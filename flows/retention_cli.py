"""`popalign plan` and `popalign gc`: what a run will take, and what old runs may give back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from popalign_core.config import RunConfig

console = Console()
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]


def plan(
    preset: Annotated[str, typer.Argument(help="emoji, sdxl or sdxl-paper; not needed with --run-id.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", help="stage.field=value, as often as needed.")] = None,
    run_id: Annotated[str, typer.Option(help="A run of the workspace: counts only what it has left.")] = "",
    detect: Annotated[
        float,
        typer.Option(min=0, help="Fall of the mean disparity (L2): how many images show it; 0 = not asked."),
    ] = 0.0,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Shows what a run would draw and train, how long, on how much disk and in how much memory, without doing it."""
    from tasks.memory_plan import memory_rows
    from tasks.plan import planned_work

    config = _planned_config(preset, settings or [], run_id, workspace)
    found = planned_work(config, str(workspace), run_id)
    table = Table("stage", "work", "rate", "arithmetic", "device time", "disk")
    for row in found.rows:
        table.add_row(*map(escape, row.cells()))
    table.add_section()
    table.add_row(*map(escape, found.total.cells()), style="bold")
    console.print(table)
    memory = Table("memory of", "at", "needed", "GiB of")
    rows, notes = memory_rows(config)
    for row in rows:
        memory.add_row(*map(escape, (row.stage, row.setting, row.needed, row.parts)))
    if rows:
        console.print(memory)
    if detect:
        notes += _print_detection(config, str(workspace), detect)
    for note in (*found.notes, *notes):
        console.print(escape(note), highlight=False)
    console.print(f"{found.free_bytes / 1e9:,.1f} GB are free in {escape(str(workspace.absolute()))}", highlight=False)
    if found.warning:
        console.print(f"[bold red]warning:[/] {escape(found.warning)}", highlight=False)


def gc(
    older_than: Annotated[float, typer.Option(min=0, help="Days since a run's last commit or start.")] = 30.0,
    decision: Annotated[
        list[str] | None,
        typer.Option(
            help="any, hold, promote or none (never finished), as often as needed; hold and none if left out."
        ),
    ] = None,
    what: Annotated[
        list[str] | None,
        typer.Option(
            help="images, checkpoints or weights, as often as needed; if left out images and checkpoints, and the "
            "weights of held models."
        ),
    ] = None,
    workspace: WorkspaceOption = Path("workspace"),
    yes: Annotated[bool, typer.Option("--yes", help="Removes what is listed.")] = False,
) -> None:
    """Lists, and with --yes removes, images, checkpoints and weights of old runs; no table, no promoted model."""
    from tasks.retention import collect_garbage, gc_choice

    found = collect_garbage(str(workspace), gc_choice(older_than, decision or [], what or []), yes=yes)
    table = Table("run", "decision", "age", "removed" if yes else "what", "size")
    for row in found.rows:
        table.add_row(*map(escape, row))
    if found.rows:
        table.add_section()
        table.add_row("total", "", "", "", found.total, style="bold")
        console.print(table)
    for problem in found.problems:
        console.print(escape(problem), highlight=False)
    console.print(escape(found.conclusion), highlight=False)


def _print_detection(config: "RunConfig", workspace: str, change: float) -> list[str]:
    from tasks.power_plan import HEADINGS, planned_detection

    table = Table(*HEADINGS, title=f"Whether a fall of the mean held-out disparity (L2) by {change:g} would be shown")
    rows, notes = planned_detection(config, workspace, change)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    return notes


def _planned_config(preset: str, settings: list[str], run_id: str, workspace: Path) -> "RunConfig":
    from popalign_core.errors import InvalidInput
    from popalign_core.presets import chosen_config

    if preset:
        return chosen_config(preset, settings, None)
    if not run_id or settings:
        raise InvalidInput("which preset? emoji, sdxl or sdxl-paper; without --set, --run-id names a run to plan.")
    from tasks.run import run_config

    return run_config(str(workspace), run_id)
