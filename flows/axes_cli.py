"""The command that classifies a finished run on one more axis."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def axis(
    run_id: str,
    name: Annotated[str, typer.Argument(help="perceived_age, ..., or a JSON file with groups and phrases.")],
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")] = Path("workspace"),
) -> None:
    """Labels a run's images on another axis by the builder's model, from stored vectors, and measures held-out ones."""
    from popalign_core.phrases import described_axis
    from storage.layout import Workspace
    from storage.locks import run_lock
    from tasks.axes import add_axis
    from tasks.run import run_config

    place = Workspace.open(workspace)
    root, wanted = str(place.root), described_axis(name)
    with run_lock(place, run_id):
        found = add_axis(root, run_id, run_config(root, run_id), wanted)
    console = Console()
    console.print(f"{wanted.axis.name} by {found.classifier_id}, {found.shards} shards, held-out neutral prompts:")
    tables = (
        (Table("model", "disparity (L2, mean over prompts)", "sampling floor", "n", "unknown"), found.disparities),
        (Table("model", "group", "images", "share, 95% interval"), found.shares),
    )
    for table, rows in tables:
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"rows: popalign sql -w {place.root} \"FROM attributes WHERE axis = '{wanted.axis.name}'\"")
