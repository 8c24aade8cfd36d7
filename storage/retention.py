"""What old runs may lose: images, weights and checkpoints. Tables stay, and so do promoted models.

    runs/<run>/samples/<key>/images.parquet      the bytes of images, and latents.parquet; `samples` beside it stays
    runs/<run>/models/<key>/<part>/...           weights; `models` and `training_steps` beside them stay
    runs/<run>/.checkpoints/, .latents/          of trainings that did not end
    runs/<run>/<table>/<key>/removed.json        the tombstone: written before a file goes, never changed otherwise

`storage.removal` removes it.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

from storage.artifacts import (
    MANIFEST,
    REMOVED,
    ArtifactRef,
    committed_folders,
    committed_keys,
    read_manifest,
    read_tombstone,
)
from storage.errors import RemovedArtifact, StorageError
from storage.image_latents import LATENTS
from storage.layout import STAGING, Workspace
from storage.schemas import FOLDER, TABLES
from storage.tables import read_rows

What = Literal["images", "checkpoints", "weights"]
Decision = Literal["hold", "promote", "none"]
Models = AbstractSet[tuple[str, str]]
CHECKPOINTS, MOVED_CHECKPOINTS = ".checkpoints", "checkpoints~"
IMAGES = ("images.parquet", "latents.parquet")
DAY_SECONDS = 86400


@dataclass(frozen=True)
class Choice:
    """Which runs, and what of them.

    older_than_days: since the last commit or start of a run. decisions: "none" is a run that was not finished.
    what: None = images and checkpoints, and the weights of held models.
    """

    older_than_days: float
    decisions: frozenset[Decision]
    what: frozenset[What] | None = None

    def takes(self, what: What, decision: Decision) -> bool:
        """Whether that part of a run with that decision goes."""
        return what in self.what if self.what is not None else what != "weights" or decision == "hold"


@dataclass(frozen=True)
class Part:
    """Files of one artifact, or a run's checkpoints: what is removed at once. bytes: on the disk now."""

    what: What
    ref: ArtifactRef | None
    names: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class OldRun:
    """A run that was chosen. problem: why nothing of it is removed; empty where nothing stands against it."""

    run_id: str
    decision: Decision
    age_days: float
    parts: tuple[Part, ...]
    problem: str = ""


def removable(
    workspace: Workspace, choice: Choice, protected: Models = frozenset(), now: float | None = None
) -> list[OldRun]:
    """Chosen runs that have something to lose, by name; nothing is touched.

    protected: (run, model) pairs whose weights stay, beside every promoted model and every one that an unfinished run
    starts from. now: seconds since 1970.
    """
    kept = protected | starting_models(workspace)
    found = (look_at(workspace, run_id, choice, kept, now) for run_id in workspace.run_ids())
    return [run for run in found if run is not None]


def check_complete(workspace: Workspace, run_id: str) -> None:
    """A run that is to go on has all its files; a decided one reads only tables. Raises: RemovedArtifact by name."""
    if not committed_folders(workspace, run_id, "decisions") and (ref := _first_removal(workspace, run_id)) is not None:
        tombstone = read_tombstone(ref)
        raise RemovedArtifact(
            f"run {run_id!r} in {workspace.root} was not finished and cannot go on: files of it, like those of "
            f"{ref.table}/{ref.key}, were removed by `popalign gc` on {tombstone.removed_at[:10] if tombstone else '?'}"
            ". Start it again under another --run-id; its tables are still there."
        )


def starting_models(workspace: Workspace) -> set[tuple[str, str]]:
    """(run, model) pairs that the configuration of an unfinished run names, as a path or as run/model.

    A run whose own files were removed does not go on, and needs no model.
    """
    found: set[tuple[str, str]] = set()
    for run_id in workspace.run_ids():
        if not committed_folders(workspace, run_id, "decisions") and _first_removal(workspace, run_id) is None:
            for row in read_rows(workspace, run_id, "runs", columns=["config_json"]):
                found |= {model for text in _texts(json.loads(row["config_json"])) for model in _named(workspace, text)}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        whole = cast("dict[str, Any] | list[Any]", value)
        for inner in whole.values() if isinstance(whole, dict) else whole:
            yield from _texts(inner)


def _named(workspace: Workspace, text: str) -> Iterator[tuple[str, str]]:
    """The model that a text names: as a path into its folder, also below the workspace, or as run/model."""
    if "/" not in text:
        return
    runs = workspace.runs.resolve()
    # "workspace:runs/..." is a path below the workspace, wherever that lies.
    for path in (Path(os.path.expanduser(text)), workspace.root / text, workspace.root / text.partition(":")[2]):
        place = path.resolve()
        parts = place.relative_to(runs).parts if place.is_relative_to(runs) else ()
        if len(parts) >= 3 and parts[1] == "models":
            yield parts[0], parts[2]
    run_id, _, model_id = text.partition("/")
    if model_id and run_id in workspace.run_ids():
        yield run_id, model_id


def _first_removal(workspace: Workspace, run_id: str) -> ArtifactRef | None:
    refs = (ref for table in ("models", "samples") for ref in committed_keys(workspace, run_id, table))
    return next((ref for ref in refs if (ref.folder / REMOVED).is_file()), None)


def look_at(workspace: Workspace, run_id: str, choice: Choice, protected: Models, now: float | None) -> OldRun | None:
    """One run, as `removable` would list it; None where it is not chosen or has nothing to lose."""
    decision: Decision = "none"
    age = 0.0
    try:
        rows = read_rows(workspace, run_id, "decisions", columns=["verdict", "model_id"])
        promoted = {(run_id, row["model_id"]) for row in rows if row["verdict"] == "promote"}
        decision = "promote" if promoted else "hold" if rows else "none"
        age = ((time.time() if now is None else now) - _last_sign(workspace, run_id)) / DAY_SECONDS
        if decision not in choice.decisions or age < choice.older_than_days:
            return None
        parts = [part for part in _parts(workspace, run_id, protected | promoted) if choice.takes(part.what, decision)]
    except StorageError as error:  # one damaged run keeps no other
        return OldRun(run_id, decision, age, (), str(error))
    return OldRun(run_id, decision, age, tuple(parts)) if parts else None


def _last_sign(workspace: Workspace, run_id: str) -> float:
    """When the run last committed something, or was started; of an empty run, when its folder was made."""
    tables = TABLES.keys() - FOLDER.keys()
    folders = [folder for table in tables for folder in committed_folders(workspace, run_id, table)]
    starts = read_rows(workspace, run_id, "starts", columns=["started_at"])
    signs = [os.stat(f"{folder}/{MANIFEST}").st_mtime for folder in folders]
    signs += [datetime.fromisoformat(row["started_at"]).timestamp() for row in starts]
    return max(signs, default=workspace.run_folder(run_id).stat().st_mtime)


def _parts(workspace: Workspace, run_id: str, protected: Models) -> Iterator[Part]:
    """All that a run could lose. Checkpoints first: they need no tombstone, for which a full disk has no room."""
    if folders := checkpoint_folders(workspace.run_folder(run_id)):
        files = (path for folder in folders for path in folder.rglob("*"))
        yield Part("checkpoints", None, (), sum(path.stat().st_size for path in files if path.is_file()))
    for ref in committed_keys(workspace, run_id, "samples"):
        yield from _part("images", ref, [name for name in read_manifest(ref).files if name in IMAGES])
    for ref in committed_keys(workspace, run_id, "models"):
        if (run_id, ref.key) not in protected:
            names = [name for name in read_manifest(ref).files if "/" in name and not name.endswith(".parquet")]
            yield from _part("weights", ref, names)


def _part(what: What, ref: ArtifactRef, names: Iterable[str]) -> Iterator[Part]:
    there = [name for name in names if (ref.folder / name).is_file()]
    if there:
        yield Part(what, ref, tuple(there), sum((ref.folder / name).stat().st_size for name in there))


def checkpoint_folders(run: Path) -> list[Path]:
    """The run's checkpoints, latents encoded for its training, and what a removal that was killed had moved away."""
    folders = [run / CHECKPOINTS, run / LATENTS, *(run / STAGING).glob(f"{MOVED_CHECKPOINTS}*")]
    return [folder for folder in folders if folder.is_dir()]
