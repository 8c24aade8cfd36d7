"""What a study and an audit need of a run: its two models, held-out images, what the judge said of them, pictures."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from popalign_core.assessment.misclassification import NO_PERSON, UNKNOWN
from popalign_core.classification import Status
from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import AnswerFile, PageKind, UnusableAnswers, require_page
from popalign_core.reporting.contact_sheet import thumbnail
from storage.artifacts import ArtifactRef, committed_keys, is_committed
from storage.images import decode_image
from storage.layout import Workspace
from storage.tables import read_images, read_rows
from tasks.run import BASE, reference

PURPOSE, SPLIT = "evaluation", "eval"
TABLES: dict[PageKind, tuple[str, str]] = {"study": ("studies", "study_id"), "audit": ("audit_samples", "audit_id")}
Row = dict[str, Any]


def compared_models(place: Workspace, run_id: str, model_id: str = "") -> tuple[str, str]:
    """Base and aligned model: the one asked for, else the one decided on. Raises: InvalidInput."""
    if model_id:
        return BASE, model_id
    decided = read_rows(place, run_id, "decisions", columns=["model_id"])
    if not decided:
        raise InvalidInput(
            f"run {run_id!r} in {place.root} has no decision yet: let it finish, or name a model that has been drawn "
            "with --model."
        )
    return BASE, str(decided[-1]["model_id"])


def held_out_rows(place: Workspace, run_id: str, table: str, model_id: str, suffix: str = "") -> list[Row]:
    """Rows of a table of shards that are of a model's held-out neutral prompts. Raises: InvalidInput if there are none.

    suffix: of the shards' keys, `.judge` for attributes.
    """
    start = f"{model_id}.{PURPOSE}."
    keys = [ref.key for ref in committed_keys(place, run_id, table) if ref.key.startswith(start)]
    rows = read_rows(place, run_id, table, keys=[key for key in keys if key.endswith(suffix)])
    if not rows:
        known = ", ".join(place.run_ids()) or "none"
        raise InvalidInput(
            f"run {run_id!r} in {place.root} has no {table} of {model_id!r} on held-out prompts. Runs there: {known}; "
            "the assessment draws and classifies them."
        )
    return rows


def predicted_outcome(row: Row) -> str:
    """What the classifier said of an image on an axis, from a row of `attributes`."""
    if row["status"] == Status.OK:
        return str(row["label"])
    return NO_PERSON if row["status"] == Status.NO_PERSON else UNKNOWN


def page_secret(rows: Iterable[Row], *more: str) -> str:
    """A secret of the workspace: a digest of the stored images, which a page does not hold in this form."""
    parts = sorted(str(row["image_sha256"]) + str(row["sample_id"]) for row in rows)
    return hashlib.sha256("\n".join([*more, *parts]).encode()).hexdigest()


def pictures(place: Workspace, run_id: str, sample_ids: Iterable[str], most_pixels: int) -> dict[str, bytes]:
    """WebP bytes of the images, small enough for a page. Raises: InvalidInput if one is no longer there."""
    wanted = set(sample_ids)
    found = read_images(place, run_id, wanted)
    if missing := wanted - set(found):
        raise InvalidInput(
            f"{len(missing)} of {len(wanted)} images of run {run_id!r} are not there any more, as {min(missing)}: "
            "`popalign gc` removed them. Make the page before that, or run again under another id."
        )
    return {name: thumbnail(decode_image(data), most_pixels) for name, data in found.items()}


def page_of(place: Workspace, kind: PageKind, file: AnswerFile, source: Path) -> tuple[ArtifactRef, list[Row]]:
    """The committed page that a file answers, and its rows. Raises: UnusableAnswers."""
    table, column = TABLES[kind]
    require_page(file, kind, file.id, file.digest, source)
    for run_id in place.run_ids():
        rows = read_rows(place, run_id, table, equal={column: file.id})
        if rows and rows[0]["page_digest"] == file.digest:
            return reference(str(place.root), run_id, table, file.id), rows
        if rows:
            require_page(file, kind, file.id, str(rows[0]["page_digest"]), source)
    raise UnusableAnswers(
        f"{source} answers {kind} {file.id!r}, which no run in {place.root} has made. Choose the workspace that the "
        "page was made in with --workspace."
    )


def refuse_other_page(ref: ArtifactRef, digest: str) -> None:
    """Raises: InvalidInput if a page of that name was made before and shows or asks something else."""
    if not is_committed(ref):
        return
    rows = read_rows(Workspace.open(ref.workspace), ref.run_id, ref.table, keys=[ref.key], columns=["page_digest"])
    if any(row["page_digest"] != digest for row in rows):
        raise InvalidInput(
            f"{ref.table} {ref.key!r} of run {ref.run_id!r} was made before with other images or questions, and its "
            "answers belong to that page. Choose another --name."
        )


def person_key(page_id: str, alias: str) -> str:
    """Key of one person's answers to a page; an alias may hold what a file name may not."""
    return f"{page_id}.{hashlib.blake2b(alias.casefold().encode(), digest_size=6).hexdigest()}"
