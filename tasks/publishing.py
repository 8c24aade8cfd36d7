"""What a finished run leaves on its page in Prefect: summary with images, table of disparities, an event."""

import base64
import re
from typing import Any

from prefect.artifacts import MarkdownArtifact, TableArtifact

from storage.layout import Workspace
from storage.tables import read_rows
from tasks.events import DECIDED, emit
from tasks.reporting import held_out_sheets
from tasks.run import BASE
from tasks.run_page import show
from tasks.summary import RunSummary

# The server takes 4 MB; a page stays quick below one.
MOST_BYTES = 900_000
SHEET_ROWS = (8, 4, 2)
MEASURES = ("l2", "total_variation")


def artifact_key(run_id: str, what: str) -> str:
    """Prefect's keys are lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"popalign-{run_id}-{what}".lower()).strip("-")


def publish_run(workspace: str, run_id: str, summary: RunSummary) -> None:
    """Artifacts of the flow run that calls this (a subflow's are not shown on its parent's page), and the event."""
    place = Workspace.open(workspace)
    decision = read_rows(place, run_id, "decisions")[0]
    sheet = _sheet(place, run_id, decision["model_id"])
    show(
        MarkdownArtifact(
            key=artifact_key(run_id, "summary"),
            markdown=_summary(place, run_id, summary, sheet),
            description=f"{run_id}: {summary.verdict}",
        )
    )
    show(
        TableArtifact(
            key=artifact_key(run_id, "disparities"),
            table=_disparities(place, run_id),
            description="Disparities of held-out neutral prompts: mean over prompts, 95% interval, sampling floor.",
        )
    )
    facts = {name: decision[name] for name in ("run_id", "base_model_id", "model_id", "verdict", "reason")}
    emit(DECIDED, run_id, f"decision.{decision['model_id']}", {**facts, "failed_checks": list(summary.failed_checks)})


def _summary(place: Workspace, run_id: str, summary: RunSummary, sheet: str) -> str:
    lines = [
        f"## {summary.verdict}: {summary.reason}",
        "",
        "| held-out neutral prompts | before | after | ratio |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in summary.headline),
        "",
        *([f"**Drawn differently**: {summary.drawn_differently}", ""] if summary.drawn_differently else []),
        sheet,
        # Browsers block links from a page of the server to a file, so the path is there to copy as well.
        f"Report: [report.html](file://{summary.report}) at `{summary.report}`",
        "",
        f"Tables: `popalign sql -w {place.root} \"FROM comparisons WHERE run_id = '{run_id}'\"`",
    ]
    return "\n".join(lines)


def _sheet(place: Workspace, run_id: str, kept: str) -> str:
    """Images before and after as Markdown, of as many prompts as fit; the same prompts and seeds on both sides."""
    prompts = read_rows(place, run_id, "prompts")
    for most in SHEET_ROWS:
        sheets = held_out_sheets(place, run_id, kept, prompts, most)
        if not sheets or sheets[0].after is None:
            return ""
        lines = [f"### The same prompts and seeds: {BASE}, then {kept}", ""]
        lines += [f"Rows: {', '.join(sheets[0].row_labels)}", ""]
        pictures = ((BASE, sheets[0].before), (kept, sheets[0].after))
        lines += [f"![{name}]({_inline(image)})\n" for name, image in pictures if image is not None]
        text = "\n".join(lines)
        if len(text) < MOST_BYTES:
            return text
    return ""


def _inline(image: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(image).decode()}"


def _disparities(place: Workspace, run_id: str) -> list[dict[str, Any]]:
    wanted = {"split": "eval", "level": "mean", "measure": list(MEASURES), "target": "uniform"}
    rows = read_rows(place, run_id, "disparities", equal=wanted)
    return [
        {
            "model": row["model_id"],
            "perceived axis": row["axis"],
            "measure": row["measure"],
            "value": round(row["value"], 4),
            "95% interval": f"[{row['low']:.4f}, {row['high']:.4f}]",
            "sampling floor": "" if row["floor"] is None else f"{row['floor']:.4f}",
            "n": row["n"],
            "unknown": row["unknown"],
            "judge": row["judge_id"],
        }
        for row in rows
    ]
