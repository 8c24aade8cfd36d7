"""`popalign compare-samplers`: does a fast sampler move the population that is measured?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.in_process import quiet_prefect, split_execution, without_heartbeat

if TYPE_CHECKING:
    from popalign_core.presets import PresetName
    from tasks.sampler_comparison import SamplerSummary

console = Console()
TABLE_WIDTH = 120


def compare_samplers(
    preset: Annotated[str, typer.Argument(help="emoji, sdxl or sdxl-paper.")],
    run_id: Annotated[str, typer.Option(help="Names both runs: <id>-exact and <id>-fast; the same id goes on.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="stage.field=value, as often as needed; one of sampling.approximate at least."),
    ] = None,
    exact_run_id: Annotated[
        str, typer.Option(help="A run with the same settings but for sampling.approximate; its images are used.")
    ] = "",
    margin: Annotated[float, typer.Option(help="Largest change of a share that counts as none.")] = 0.05,
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")] = Path("workspace"),
) -> None:
    """Draws the same prompts and seeds by the exact and by a fast sampler, and compares who is perceived in them."""
    quiet_prefect()
    from popalign_core.presets import chosen_config
    from tasks.inputs import check_inputs
    from tasks.sampler_comparison import both_configs

    changes, execution = split_execution(settings or [])
    # What can be refused is refused before Prefect's server starts.
    check_inputs(both_configs(chosen_config(preset, changes, None))[1])
    from flows.sampler_comparison import sampler_comparison
    from tasks.progress import terminal_progress

    with terminal_progress():
        summary = without_heartbeat(
            lambda: sampler_comparison(
                run_id,
                cast("PresetName", preset),
                settings=changes,
                exact_run_id=exact_run_id,
                margin=margin,
                workspace=str(workspace.absolute()),
                execution=execution,
            )
        )
    _show(summary, workspace)


def _show(summary: "SamplerSummary", workspace: Path) -> None:
    from tasks.sampler_comparison import HEADINGS

    for role, lines in summary.lines.items():
        name = escape(f"{role} {summary.classifiers[role]}")
        table = Table(*HEADINGS, title=name, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
        for line in lines:
            table.add_row(*map(escape, line))
        # A file or a pipe has no width, and 80 would break every cell.
        console.print(table, width=None if console.is_terminal else TABLE_WIDTH)
    console.print(escape(f"fast: {'; '.join(summary.approximations)}"), highlight=False, soft_wrap=True)
    if summary.differences:
        more = f"[bold]also drawn differently[/], which may move people as well: {escape(summary.differences)}"
        console.print(more, highlight=False, soft_wrap=True)
    quicker = "speed not compared" if summary.speed is None else f"{summary.speed:.2f} times as fast"
    console.print(escape(f"{quicker}: {summary.speed_source}"), highlight=False, soft_wrap=True)
    console.print(f"[bold]{summary.movement}[/]: {escape(summary.reason)}", highlight=False, soft_wrap=True)
    console.print(escape(f"pairs, exact above fast: {summary.sheet}"), highlight=False, soft_wrap=True)
    query = f"FROM sampler_comparisons WHERE run_id = '{summary.fast_run_id}'"
    console.print(f'tables: popalign sql -w {escape(str(workspace))} "{query}"', highlight=False, soft_wrap=True)
