"""The commands of the model registry: `popalign models | promote | rollback | export`. Imports no torch by itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from storage.registry import ModelEntry, Move

console = Console()
WorkspaceOption = Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")]
ModelOption = Annotated[str, typer.Option(help="A model of the run; empty = the one that it decided on.")]


def models(workspace: WorkspaceOption = Path("workspace")) -> None:
    """Lists trained models: what each was made from, what was decided and measured, and which one is promoted."""
    from tasks.registry import listed_models

    table = Table("", "run", "model", "base", "trained", "decision", "held-out disparity before, after, ratio")
    for row in listed_models(str(workspace)):
        trained = f"{row['adapter']}, {row['objective']}"
        cells = [row["run_id"], row["model_id"], row["base_model"] or "not recorded", trained]
        cells += [row["verdict"] or "none", _disparities(row["disparities"] or [])]
        table.add_row("*" if row["promoted"] else "", *map(escape, cells))
    console.print(table)
    console.print("* is the current model: what `popalign promote` named last.", highlight=False)


def promote(
    run_id: Annotated[str, typer.Argument(help="A run that was decided.")],
    model: ModelOption = "",
    force: Annotated[bool, typer.Option("--force", help="Also a model that is held; needs a reason.")] = False,
    reason: Annotated[str, typer.Option(help="Why; kept in the registry.")] = "",
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Makes a run's model the current one, from which a nightly run may start."""
    from tasks.registry import promote_model

    _say(promote_model(str(workspace), run_id, model, force=force, reason=reason), f"run {run_id}")


def rollback(
    to: Annotated[str, typer.Option(help="A run promoted earlier, or base; empty = the model before.")] = "",
    reason: Annotated[str, typer.Option(help="Why; kept in the registry.")] = "",
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Goes back to the model that was the current one before, or to the base as configured."""
    from tasks.registry import rollback_model

    _say(rollback_model(str(workspace), to, reason=reason), to)


def export(
    run_id: Annotated[str, typer.Argument(help="A run with a trained model.")],
    model: ModelOption = "",
    to: Annotated[Path | None, typer.Option(help="A new folder; empty = <run>.<model> here.")] = None,
    workspace: WorkspaceOption = Path("workspace"),
) -> None:
    """Writes a trained model, with a model card, into a folder that plain diffusers opens."""
    from tasks.registry import export_model

    folder = export_model(str(workspace), run_id, model, to)
    console.print(f"{escape(str(folder))}: README.md says how to open it.", highlight=False, soft_wrap=True)


def _say(move: "Move | None", name: str) -> None:
    if move is None:
        text = f"{name} is the current model already; nothing was changed."
    else:
        text = f"current model: {_named(move.after)} (before: {_named(move.before)})"
    console.print(escape(text), highlight=False, soft_wrap=True)


def _named(entry: "ModelEntry | None") -> str:
    return f"{entry.run_id}/{entry.model_id}" if entry else "the base as configured"


def _disparities(measured: list[dict[str, Any]]) -> str:
    lines: list[str] = []
    for row in measured:
        interval = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        lines.append(f"{row['axis']} {row['before']:.3f}, {row['after']:.3f}, {interval}")
    return "\n".join(lines)
