"""`popalign study` and `popalign audit`: what people say of a run's images. Imports no torch by itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from popalign_core.assessment.resampling import Estimate

console = Console()
study = typer.Typer(no_args_is_help=True, help="Blinded comparisons of base and aligned model by people.")
audit = typer.Typer(no_args_is_help=True, help="Labels by people, to correct for the classifier's errors.")
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]
RunArgument = Annotated[str, typer.Argument(help="A run that was assessed.")]
ModelOption = Annotated[str, typer.Option(help="A model of the run; empty = the one that it decided on.")]
FilesArgument = Annotated[list[Path], typer.Argument(help="Files that the page gave.")]


@study.command("create")
def study_create(  # noqa: PLR0913 - options of a command
    run_id: RunArgument,
    name: Annotated[str, typer.Option(help="Of the study; one run may have several.")] = "study",
    model: ModelOption = "",
    grids: Annotated[
        str, typer.Option(help="Questions on grids of images: quality, match, diversity, evenness; empty = none.")
    ] = "quality,diversity",
    singles: Annotated[
        str, typer.Option(help="Questions on single images: quality, match; empty = none.")
    ] = "quality,match",
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts at most.")] = 12,
    grid: Annotated[int, typer.Option(min=2, max=36, help="Images a side.")] = 9,
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Pixels a side on the page, at most.")] = 256,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Writes one HTML page that compares base and aligned model blindly."""
    from tasks.studies import StudyRequest, create_study

    request = StudyRequest(name, model, _names(grids), _names(singles), prompts, grid, image_size)
    _tell_page(create_study(str(workspace), run_id, request), "study", workspace)


@study.command("ingest")
def study_ingest(
    files: FilesArgument,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="Also of raters who stopped early.")] = False,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Checks files of votes and stores them; a file that is refused stores none."""
    from tasks.studies import ingest_votes

    for file in ingest_votes(str(workspace), files, incomplete=incomplete):
        _say(f"{file.alias}: {len(file.answers)} votes on {file.id}")


@study.command("results")
def study_results(run_id: RunArgument, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Win rates with intervals over prompts, agreement, and how the votes were given."""
    from tasks.studies import require_votes
    from tasks.studies import study_results as results_of

    found = results_of(str(workspace), run_id)
    require_votes(found, run_id)
    for result in found:
        columns = ("question", "win rate", "win, tie, loss", "prompts", "raters", "alpha", "s a vote")
        table = Table(*columns, title=f"study {result.study_id}: {result.model_id} against {result.base_model_id}")
        for row in result.questions:
            what = ", ".join(part for part in (row.level, row.question, row.axis) if part)
            votes = f"{row.wins}, {row.ties}, {row.losses}"
            cells = [what, _share(row.win_rate), votes, str(row.prompts), str(row.raters)]
            table.add_row(*map(escape, [*cells, _plain(row.agreement), f"{row.median_seconds:.1f}"]))
        console.print(table)
        quality = result.raters
        _say(
            f"{quality.raters} raters, {quality.votes} votes. Repeats answered alike: {_share(quality.consistency)}. "
            f"Identical sides told: {_share(quality.attention)}. A chosen: {_share(quality.first_side)}."
        )
    _say("Win rate: of the aligned model, ties half; 95% interval over prompts (Wilson, effective number of votes).")


@audit.command("create")
def audit_create(
    run_id: RunArgument,
    name: Annotated[str, typer.Option(help="Of the audit; one run may have several.")] = "audit",
    images: Annotated[int, typer.Option(min=1, help="Images to label, of both models.")] = 240,
    model: ModelOption = "",
    image_size: Annotated[int, typer.Option(min=32, max=1024, help="Pixels a side on the page, at most.")] = 384,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Writes one HTML page on which people label blinded images."""
    from tasks.audits import create_audit

    page = create_audit(str(workspace), run_id, name=name, images=images, model_id=model, image_size=image_size)
    _tell_page(page, "audit", workspace)


@audit.command("ingest")
def audit_ingest(files: FilesArgument, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Checks files of labels, stores them, and corrects the group shares by all labels that are there."""
    from tasks.audits import ingest_audits

    for file in ingest_audits(str(workspace), files):
        _say(f"{file.alias}: {len(file.answers)} labels of {file.id}")


@audit.command("results")
def audit_results(run_id: RunArgument, workspace: WorkspaceOption = Path("workspace")) -> None:
    """Confusion matrices and group shares corrected by them."""
    from tasks.corrections import newest_corrections, require_corrections

    found = newest_corrections(str(workspace), run_id)
    require_corrections(found, run_id)
    errors = Table(
        "axis", "people say", "classifier says", "share", "images", title="classified as, of what people perceive"
    )
    for row in found["confusion_matrices"]:
        if row["n"] and (row["count"] or row["perceived"] == row["predicted"]):
            share = _interval(row["share"], row["low"], row["high"])
            cells = [row["axis"], row["perceived"], row["predicted"], share, f"{row['count']} of {row['n']}"]
            errors.add_row(*map(escape, cells))
    console.print(errors)
    shares = Table("axis", "model", "group", "method", "share", "worst case", "audited", title="shares among people")
    for row in found["corrected_shares"]:
        bounds = f"{row['bound_low']:.1%} to {row['bound_high']:.1%}"
        cells = [row["axis"], row["model_id"], row["group"], row["method"].replace("_", " ")]
        cells += [_interval(row["share"], row["low"], row["high"]), bounds, str(row["audited"])]
        shares.add_row(*map(escape, cells))
    console.print(shares)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _tell_page(page: Path, kind: str, workspace: Path) -> None:
    _say(f"{page}\nSend this file to people; each saves a file of answers at its end. Then:")
    _say(f"popalign {kind} ingest FILE... -w {workspace}")


def _share(value: "Estimate") -> str:
    return _interval(value.value, value.low, value.high) if value.n else "not asked"


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _plain(value: "Estimate") -> str:
    if value.value != value.value:
        return "not known"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _say(text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
