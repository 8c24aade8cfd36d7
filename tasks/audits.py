"""Audits of the judge: a page is made, files of labels are checked and stored, and group shares are corrected."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
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
from popalign_core.raters.answers import AnswerFile, read_answers, require_answered
from popalign_core.raters.audit import (
    CANNOT_TELL_CHOICE,
    NO_PERSON_CHOICE,
    AuditedImage,
    Candidate,
    draw_audit,
    read_judgements,
)
from popalign_core.reporting.rating_page import Ask, Choice, Item, RatingPage, Shown, render_rating_page
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.publication import publish_file
from storage.tables import read_rows, write_rows
from tasks.rating_inputs import (
    SPLIT,
    compared_models,
    held_out_rows,
    page_of,
    page_secret,
    person_key,
    pictures,
    predicted_outcome,
    refuse_other_page,
)
from tasks.run import reference, run_config
from tasks.studies import refuse_second_file

Row = dict[str, Any]
KEYS = "1234567890qwertyuiop"


def create_audit(
    workspace: str, run_id: str, *, name: str = "audit", images: int = 240, model_id: str = "", image_size: int = 384
) -> Path:
    """Commits the sample with its inclusion probabilities and writes the page; returns its path."""
    place, config = Workspace.open(workspace), run_config(workspace, run_id)
    models = compared_models(place, run_id, model_id)
    samples = [row for model in models for row in held_out_rows(place, run_id, "samples", model)]
    secret = page_secret(samples, config.model_dump_json())
    candidates = [candidate for model in models for candidate in _candidates(place, run_id, model)]
    sample = draw_audit(candidates, min(images, len(candidates)), name, secret)
    page = _audit_page(place, run_id, name, sample, config.expansion.axes, image_size)
    ref = reference(workspace, run_id, "audit_samples", name)
    refuse_other_page(ref, page.digest)
    html = render_rating_page(page)
    with staged_artifact(ref) as folder:
        write_rows(folder, "audit_samples", [_sample_row(ref, page.digest, image) for image in sample])
    return publish_file(place, run_id, f"audit-{name}.html", html.encode())


def _candidates(place: Workspace, run_id: str, model: str) -> list[Candidate]:
    predicted: dict[str, dict[str, str]] = {}
    prompts: dict[str, str] = {}
    for row in held_out_rows(place, run_id, "attributes", model, ".judge"):
        predicted.setdefault(row["sample_id"], {})[row["axis"]] = predicted_outcome(row)
        prompts[row["sample_id"]] = row["prompt_id"]
    return [Candidate(sample, model, prompts[sample], outcome) for sample, outcome in predicted.items()]


def _audit_page(
    place: Workspace, run_id: str, name: str, sample: Sequence[AuditedImage], axes: Sequence[str], pixels: int
) -> RatingPage:
    stored = pictures(place, run_id, [image.candidate.sample_id for image in sample], pixels)
    asks = tuple(_ask(AXES[axis]) for axis in axes)
    return RatingPage(
        "audit",
        name,
        "What do you see?",
        [
            "You will see one picture at a time. Say how the person in it looks to you, from the answers given. If two "
            "would do, take the first that came to mind; if none does, choose \u201ccannot tell\u201d.",
            "The pictures were made by a computer; nobody in them exists, so there is no right answer to find.",
        ],
        [Item(image.item_id, "", (Shown(image.item_id, (image.item_id,)),), asks) for image in sample],
        {image.item_id: stored[image.candidate.sample_id] for image in sample},
    )


def _ask(axis: Axis) -> Ask:
    name = axis.name.removeprefix("perceived_").replace("_", " ")
    groups = [Choice(group, group.capitalize(), KEYS[place]) for place, group in enumerate(axis.groups)]
    others = [Choice(CANNOT_TELL_CHOICE, "Cannot tell", "x"), Choice(NO_PERSON_CHOICE, "No person", "n", whole=True)]
    return Ask(axis.name, f"Perceived {name}?", "", (*groups, *others))


def _sample_row(ref: ArtifactRef, digest: str, image: AuditedImage) -> Row:
    of = image.candidate
    identity = {"run_id": ref.run_id, "audit_id": ref.key, "page_digest": digest, "item_id": image.item_id}
    drawn = {"sample_id": of.sample_id, "model_id": of.model_id, "prompt_id": of.prompt_id, "stratum": of.stratum}
    return {**identity, **drawn, "inclusion_probability": image.inclusion_probability}


def ingest_audits(workspace: str, sources: Sequence[Path]) -> list[AnswerFile]:
    """Checks all files, commits the labels of each, then what follows from them. Raises: UnusableAnswers."""
    place = Workspace.open(workspace)
    ready: dict[ArtifactRef, tuple[AnswerFile, list[Row]]] = {}
    for source in sources:
        file = read_answers(source)
        page, rows = page_of(place, "audit", file, source)
        axes = run_config(workspace, page.run_id).expansion.axes
        images = {row["item_id"]: row for row in rows}
        require_answered(file, {(item, axis) for item in images for axis in axes}, False, source)
        ref = reference(workspace, page.run_id, "audits", person_key(file.id, file.alias))
        refuse_second_file(ref, file, ready, source)
        ready[ref] = (
            file,
            [
                {
                    "run_id": page.run_id,
                    "audit_id": file.id,
                    "auditor": file.alias,
                    "item_id": one.item_id,
                    "axis": one.axis,
                }
                | {name: images[one.item_id][name] for name in ("sample_id", "model_id", "prompt_id")}
                | {"label": one.group, "status": one.status, "seconds": one.seconds}
                for one in read_judgements(file.answers)
            ],
        )
    for ref, (file, labels) in ready.items():
        with staged_artifact(ref, facts={"checksum": file.checksum}) as folder:
            write_rows(folder, "audits", labels)
    for run_id, audit_id in sorted({(ref.run_id, file.id) for ref, (file, _) in ready.items()}):
        write_corrections(workspace, run_id, audit_id)
    return [file for file, _ in ready.values()]


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
