"""What follows from an audit's labels: confusion matrices of the judge, and group shares corrected by them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from popalign_core.assessment.corrected_shares import AuditedPopulation, confusion_cells, correct_shares
from popalign_core.assessment.misclassification import (
    CANNOT_TELL,
    NO_PERSON,
    AuditedLabels,
    perceived_outcomes,
    plurality,
    predicted_outcomes,
)
from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput
from popalign_core.raters.audit import NO_PERSON_CHOICE
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import read_rows, write_rows
from tasks.rating_inputs import SPLIT, held_out_rows, predicted_outcome
from tasks.run import reference, run_config

Row = dict[str, Any]


def write_corrections(workspace: str, run_id: str, audit_id: str) -> ArtifactRef:
    """Commits `confusion_matrices` and `corrected_shares` of an audit, by all labels that are there."""
    place, config = Workspace.open(workspace), run_config(workspace, run_id)
    labels = read_rows(place, run_id, "audits", equal={"audit_id": audit_id})
    auditors = len({row["auditor"] for row in labels})
    ref = reference(workspace, run_id, "corrected_shares", f"{audit_id}.{auditors:03d}")
    sample = read_rows(place, run_id, "audit_samples", equal={"audit_id": audit_id})
    attributes = {
        model: held_out_rows(place, run_id, "attributes", model, ".judge")
        for model in sorted({row["model_id"] for row in sample})
    }
    (judge_id,) = {row["classifier_id"] for rows in attributes.values() for row in rows}
    identity: Row = {"run_id": run_id, "audit_id": audit_id, "auditors": auditors, "judge_id": judge_id}
    shares: list[Row] = []
    cells: list[Row] = []
    for name in config.expansion.axes:
        populations = {
            model: _population(AXES[name], rows, [one for one in sample if one["model_id"] == model], labels)
            for model, rows in attributes.items()
        }
        settings = {"seed": config.seed, "resamples": config.assessment.resamples}
        own: Row = {**identity, "axis": name}
        cells += [{**own, **asdict(cell)} for cell in confusion_cells(populations, **settings)]
        shares += [{**own, "split": SPLIT, **asdict(share)} for share in correct_shares(populations, **settings)]
    with staged_artifact(ref) as folder:
        write_rows(folder, "corrected_shares", shares)
        write_rows(folder, "confusion_matrices", cells)
    return ref


def _population(axis: Axis, rows: Sequence[Row], sample: Sequence[Row], labels: Sequence[Row]) -> AuditedPopulation:
    predicted = {
        row["sample_id"]: predicted_outcomes(axis).index(predicted_outcome(row))
        for row in rows
        if row["axis"] == axis.name
    }
    prompts = {row["sample_id"]: row["prompt_id"] for row in rows}
    places = {prompt: place for place, prompt in enumerate(sorted(set(prompts.values())))}
    counts = np.zeros((len(places), len(predicted_outcomes(axis))), dtype=np.int64)
    for sample_id, outcome in predicted.items():
        counts[places[prompts[sample_id]], outcome] += 1
    said: dict[str, list[int]] = {}
    for row in labels:
        if row["axis"] == axis.name:
            said.setdefault(row["sample_id"], []).append(_perceived(axis, row))
    audited = AuditedLabels(
        axis,
        np.array([predicted[row["sample_id"]] for row in sample], dtype=np.int64),
        np.array([plurality(said[row["sample_id"]]) for row in sample], dtype=np.int64),
        np.array([1 / row["inclusion_probability"] for row in sample], dtype=float),
    )
    return AuditedPopulation(counts, audited)


def _perceived(axis: Axis, row: Row) -> int:
    if row["status"] == NO_PERSON_CHOICE:
        return perceived_outcomes(axis).index(NO_PERSON)
    return CANNOT_TELL if row["label"] is None else axis.index(row["label"])


def newest_corrections(workspace: str, run_id: str) -> dict[str, list[Row]]:
    """The rows of `corrected_shares` and `confusion_matrices` that rest on most auditors, of every audit of the run."""
    place = Workspace.open(workspace)
    found: dict[str, list[Row]] = {}
    for table in ("corrected_shares", "confusion_matrices"):
        rows = read_rows(place, run_id, table)
        newest: dict[str, int] = {}
        for row in rows:
            newest[row["audit_id"]] = max(row["auditors"], newest.get(row["audit_id"], 0))
        found[table] = [row for row in rows if row["auditors"] == newest[row["audit_id"]]]
    return found


def require_corrections(found: dict[str, list[Row]], run_id: str) -> None:
    """Raises: InvalidInput if there is nothing to show."""
    if not found["corrected_shares"]:
        raise InvalidInput(f"no audit of run {run_id!r} yet: `popalign audit create`, then `popalign audit ingest`.")
