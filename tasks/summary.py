"""What a run came to, in a few lines."""

from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import CROSSING
from storage.artifacts import committed_keys
from storage.layout import Workspace
from storage.tables import read_rows, read_table
from tasks.throughput import run_throughput

NAMES = {"l2": "disparity (L2)", "clip_score": "CLIP score", "obedience": "obedience"}


@dataclass(frozen=True)
class RunSummary:
    """headline: rows of (what, before, after, ratio), ready to show. failed_checks: names of what held the model.

    drawn_differently: facts in which compared or mixed images were drawn differently, in words; empty is the rule.
    """

    run_id: str
    verdict: str
    reason: str
    headline: tuple[tuple[str, str, str, str], ...]
    report: str
    failed_checks: tuple[str, ...] = ()
    drawn_differently: str = ""


@task(cache_policy=NO_CACHE)
def summarize_run(workspace: str, run_id: str, report: str) -> RunSummary:
    """The headline of a finished run from its committed tables."""
    place = Workspace.open(workspace)
    decision = read_rows(place, run_id, "decisions")[0]
    lines: list[tuple[str, str, str, str]] = []
    for row in read_rows(place, run_id, "comparisons", equal={"split": "eval"}):
        # Crossed axes are in the report.
        if row["measure"] in NAMES and CROSSING not in row["axis"]:
            name = f"{row['axis'].replace('_', ' ')} {NAMES[row['measure']]}".strip()
            ratio = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
            lines.append((name, f"{row['before']:.3f}", f"{row['after']:.3f}", ratio))
    lines += _agreement_lines(place, run_id, decision["base_model_id"], decision["model_id"])
    failed = tuple(check["name"] for check in decision["checks"] if not check["passed"])
    differences = read_rows(place, run_id, "sampler_differences")
    differently = "; ".join(f"{row['compared']}: {row['fact']} {', '.join(row['values'])}" for row in differences)
    return RunSummary(run_id, decision["verdict"], decision["reason"], tuple(lines), report, failed, differently)


def _agreement_lines(place: Workspace, run_id: str, base: str, model: str) -> list[tuple[str, str, str, str]]:
    """Cohen's kappa of the two classifiers with its interval, and the images that it is of, in the place of a ratio."""
    rows = read_rows(place, run_id, "agreements", equal={"split": "eval", "measure": "cohen_kappa"})
    by_axis: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_axis.setdefault(row["axis"], {})[row["model_id"]] = row
    return [
        (
            f"{axis.replace('_', ' ')} kappa of judge and builder",
            _with_interval(found[base]),
            _with_interval(found[model]),
            f"n = {found[base]['n']} and {found[model]['n']}",
        )
        for axis, found in by_axis.items()
        if found.keys() >= {base, model}
    ]


def _with_interval(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def run_states(place: Workspace) -> list[tuple[str, str, str, str, str]]:
    """One line a run: id, committed images, models, throughput, decision."""
    lines: list[tuple[str, str, str, str, str]] = []
    for run_id in place.run_ids():
        images = len(read_table(place, run_id, "samples", columns=["sample_index"]))
        models = len(committed_keys(place, run_id, "models"))
        decisions = read_rows(place, run_id, "decisions")
        speed = run_throughput(place, run_id)
        verdict = decisions[0]["verdict"] if decisions else "not finished"
        lines.append((run_id, str(images), str(models), speed.describe() if speed else "", verdict))
    return lines
