"""`popalign scorers`: published weights of quality scores as folders that can be loaded safely."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

console = Console()
scorers = typer.Typer(no_args_is_help=True, help="Models that score the quality of images (quality.scorers).")


@scorers.command("list")
def known() -> None:
    """Shows every kind, where its weights come from, and what it gives."""
    from popalign_core.quality_config import SCORERS

    table = Table("kind", "source, where none is named", "gives")
    for name, kind in SCORERS.items():
        gives = kind.unit or f"distance to the base: {', '.join(kind.distances)}"
        table.add_row(name, kind.default or f"{name}=FOLDER, by `popalign scorers convert {name}`", gives)
    console.print(table)


@scorers.command()
def convert(
    kind: Annotated[str, typer.Argument(help="hps, aesthetics or inception.")],
    published: Annotated[Path, typer.Argument(help="The file as published (.pt, .pth).")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    base: Annotated[
        str, typer.Option(help="Architecture (hps) or backbone (aesthetics) in the place of the published one.")
    ] = "",
) -> None:
    """Writes a published file of weights as a folder of safetensors; whatever else the file holds is not run."""
    from popalign_core.models.converted_scorers import convert_scorer

    convert_scorer(kind, published, folder, base)
    console.print(f"--set quality.scorers={kind}={folder}", highlight=False, soft_wrap=True)
