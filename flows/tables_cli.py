"""`popalign sql | show | catalog | migrate`: questions to a workspace, and older versions of its tables."""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from storage.rewriting import OldFile
    from tasks.showing import Shown

console = Console()
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]
Format = Literal["table", "csv", "json", "parquet"]
catalog = typer.Typer(no_args_is_help=True, help="The DuckDB file of a workspace.")
NEIGHBOURS_SHOWN = 12
THUMBNAIL = 48


def sql(
    query: Annotated[str, typer.Argument(help='A reading statement, such as "FROM nights()".')],
    workspace: WorkspaceOption = Path("workspace"),
    kind: Annotated[Format, typer.Option("--format", "-f", help="How the result is given.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A file instead of the terminal.")] = None,
) -> None:
    """Runs a read-only DuckDB query over all committed tables."""
    from popalign_core.errors import InvalidInput
    from storage.catalog import query as run_query
    from storage.catalog import rebuild_catalog
    from storage.layout import Workspace
    from storage.results import result_bytes, write_result

    if kind == "table" and output is not None:
        raise InvalidInput("--output needs --format csv, json or parquet.")
    if kind == "parquet" and output is None:
        raise InvalidInput("--format parquet needs --output FILE.")
    place = Workspace.open(workspace)
    rebuild_catalog(place)
    found = run_query(place, query)
    if kind == "table":
        table = Table(*map(escape, found.column_names))
        for row in found.to_pylist():
            table.add_row(*map(_cell, row.values()))
        console.print(table)
    elif output is not None:
        write_result(found, kind, output)
        console.print(f"{found.num_rows} rows in {escape(str(output))}", highlight=False)
    else:
        sys.stdout.buffer.write(result_bytes(found, kind))


def show(
    sample: Annotated[str, typer.Argument(help="An image's id: model/prompt/index.")],
    run_id: Annotated[str, typer.Option(help="Where several runs have it.")] = "",
    save: Annotated[Path | None, typer.Option(help="Writes the image to a file, as it is stored (WebP).")] = None,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Shows one image: its prompt, what was perceived in it, and its neighbours in the populations."""
    from tasks.showing import shown_sample

    found = shown_sample(str(workspace), sample, run_id)
    if found.image is None:
        console.print("the image itself was removed by `popalign gc`")
    else:
        if console.is_terminal:
            console.print(_thumbnail(found.image))
        if save is not None:
            save.write_bytes(found.image)
    _describe(found)


def migrate(
    workspace: WorkspaceOption = Path("workspace"),
    yes: Annotated[bool, typer.Option("--yes", help="Rewrites what is listed.")] = False,
) -> None:
    """Lists, and with --yes rewrites, files of older table versions; their rows stay as they are."""
    from popalign_core.errors import InvalidInput
    from storage.layout import Workspace
    from storage.rewriting import migrate as migrate_files
    from storage.rewriting import old_files

    if not workspace.is_dir():
        raise InvalidInput(f"there is no workspace at {workspace.absolute()}; choose another --workspace.")
    place = Workspace.open(workspace)
    files = migrate_files(place) if yes else old_files(place)
    if not files:
        conclusion = f"nothing to do: every table in {place.root} has its current version"
    else:
        _list_old_files(files)
        runs = len({file.ref.run_id for file in files})
        what = f"{_counted(len(files), 'file')} of {_counted(runs, 'run')}"
        done = f"{what} rewritten in {place.root}; the copies for queries and the catalog were made again"
        conclusion = done if yes else f"nothing was touched: the same with --yes rewrites {what}"
    console.print(escape(conclusion), highlight=False, soft_wrap=True)


@catalog.command()
def rebuild(workspace: WorkspaceOption = Path("workspace")) -> None:
    """Writes the catalog again: after a move of the workspace, for clients that open the file themselves."""
    from storage.catalog import rebuild_catalog
    from storage.layout import Workspace

    console.print(str(rebuild_catalog(Workspace.open(workspace))), highlight=False, soft_wrap=True)


@catalog.command()
def compact(workspace: WorkspaceOption = Path("workspace")) -> None:
    """Copies the many small files of decided runs into few large ones, for queries; every run does it at its end."""
    from storage.catalog import rebuild_catalog
    from storage.compaction import compact as compact_tables
    from storage.layout import Workspace

    place = Workspace.open(workspace)
    segments = compact_tables(place)
    rebuild_catalog(place)
    runs = len({run_id for segment in segments for run_id in segment.sources})
    console.print(f"{len(segments)} files hold the tables of {runs} runs", highlight=False)


@catalog.command()
def questions() -> None:
    """Lists the catalog's macros: ready questions, for `popalign sql "FROM name(...)"`."""
    from storage.macros import MACROS

    table = Table("FROM ...", "answers")
    for name, macro in MACROS.items():
        table.add_row(escape(f"{name}({macro.parameters})"), escape(macro.comment))
    console.print(table)


def _list_old_files(files: list["OldFile"]) -> None:
    from storage.migrations import explanation
    from storage.schemas import VERSIONS

    table = Table("table", "version", "files", "rows", "size", "columns that are new")
    for name, version in sorted({(file.table, file.version) for file in files}):
        mine = [file for file in files if (file.table, file.version) == (name, version)]
        rows, size = sum(file.rows for file in mine), decimal(sum(file.bytes for file in mine))
        versions = f"{version} -> {VERSIONS[name]}"
        table.add_row(name, versions, f"{len(mine):,}", f"{rows:,}", size, explanation(name, version))
    console.print(table)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _describe(found: "Shown") -> None:
    sample, prompt = found.sample, found.prompt
    console.print(f"[bold]{escape(sample['sample_id'])}[/] of run {escape(sample['run_id'])}", highlight=False)
    console.print(escape(f'"{prompt["text"]}" ({prompt["split"]}, {prompt["kind"]})'), highlight=False)
    size = f"{sample['width']} x {sample['height']} pixels"
    console.print(f"model {escape(sample['model_id'])}, seed {sample['seed']}, {size}", highlight=False)
    perceived = Table("axis", "perceived", "confidence", "status", "said by")
    for row in found.attributes:
        label = row["label"] or "none"
        perceived.add_row(row["axis"], label, f"{row['confidence']:.2f}", row["status"], escape(row["classifier_id"]))
    console.print(perceived)
    if found.neighbours:
        population = Table("round", "population", "side", f"neighbours ({len(found.neighbours)})")
        for row in found.neighbours[:NEIGHBOURS_SHOWN]:
            population.add_row(str(row["round"]), row["population_id"], row["side"], escape(row["sample_id"]))
        console.print(population)


def _thumbnail(image: bytes) -> Text:
    """Two pixels a character: the upper half block in the colours of both."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    width, height = picture.size
    pixels = np.asarray(picture)
    text = Text()
    for y in range(0, height - 1, 2):
        for x in range(width):
            upper, lower = ("#" + bytes(pixels[y + half, x]).hex() for half in (0, 1))
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text
