"""Audits of the judge: a page is made, files of labels are checked and stored, and group shares are corrected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popalign_core.attributes import AXES, Axis
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
from storage.tables import write_rows
from tasks.corrections import write_corrections
from tasks.rating_inputs import (
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
