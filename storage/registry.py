"""The model registry: a pointer to the model in use and every move of it, in one file that changes in one step.

registry.json                             the current model, and all moves, the oldest first
registry/<run>.<model>.<digest>/unet/     a promoted adapter, merged into the UNet (or `transformer/`) it was trained on
"""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from storage.artifacts import ArtifactRef, artifact_digest, read_manifest, require_present
from storage.commit import crash_point
from storage.disk import disk_errors, write_in_one_step
from storage.errors import ConflictingArtifact, CorruptArtifact, NothingToRollBack, WorkspaceTooNew
from storage.layout import Workspace
from storage.locks import exclusive
from storage.tables import read_artifact

REGISTRY = "registry.json"
VERSION = 1
BASE = "base"
# Where the weights of a model lie in its artifact, by its adapter: what of these it has.
WEIGHTS = {"lora": ("lora",), "full": ("unet", "transformer")}


@dataclass(frozen=True)
class ModelEntry:
    """A trained model. adapter: lora or full. digest: of its artifact, so that one written anew is another model."""

    run_id: str
    model_id: str
    adapter: str
    digest: str

    def reference(self, workspace: Workspace) -> ArtifactRef:
        """Its artifact."""
        return ArtifactRef(str(workspace.root), self.run_id, "models", self.model_id)

    def weights(self, workspace: Workspace) -> Path:
        """Folder of its weights."""
        ref = self.reference(workspace)
        return ref.folder / weights_part(ref, self.adapter)


@dataclass(frozen=True)
class Move:
    """One move of the pointer. at: UTC. before, after: None is the base model as configured."""

    action: Literal["promote", "rollback"]
    at: str
    by: str
    reason: str
    forced: bool
    before: ModelEntry | None
    after: ModelEntry | None


@dataclass(frozen=True)
class Registry:
    """What the file holds. current: None is the base model as configured."""

    current: ModelEntry | None
    history: tuple[Move, ...]

    def earlier(self) -> list[ModelEntry | None]:
        """The models that can be gone back to, the nearest first and the base last; none if the base is current."""
        line: list[ModelEntry | None] = [None]
        for move in self.history:
            if move.action == "promote":
                line.append(move.after)
                continue
            while len(line) > 1 and line[-1] != move.after:
                line.pop()
        return line[-2::-1]


def weights_part(ref: ArtifactRef, adapter: str) -> str:
    """The folder of a model's weights in its artifact, present or removed. Raises: NotCommitted, CorruptArtifact."""
    files = read_manifest(ref).files
    parts = WEIGHTS[adapter]
    return next((part for part in parts if any(name.startswith(f"{part}/") for name in files)), parts[0])


def model_entry(workspace: Workspace, run_id: str, model_id: str) -> ModelEntry:
    """A committed model whose weights are there. Raises: NotCommitted, RemovedArtifact, CorruptArtifact."""
    ref = ArtifactRef(str(workspace.root), run_id, "models", model_id)
    adapter = str(read_artifact(ref, "models")[0]["adapter"])
    entry = ModelEntry(run_id, model_id, adapter, artifact_digest(ref))
    require_weights(workspace, entry)
    return entry


def require_weights(workspace: Workspace, entry: ModelEntry) -> None:
    """Raises: NotCommitted; RemovedArtifact, CorruptArtifact without weights; ConflictingArtifact if written anew."""
    ref = entry.reference(workspace)
    manifest = read_manifest(ref)
    part = weights_part(ref, entry.adapter)
    require_present(ref, part)
    files = [name for name in manifest.files if name.startswith(f"{part}/")]
    if not files or not all((ref.folder / name).is_file() for name in files):
        raise CorruptArtifact(
            f"the weights of {entry.model_id} of run {entry.run_id!r} are missing in {ref.folder}. Remove that folder "
            "and run again with the same run id, or choose another model: `popalign models` lists them."
        )
    if manifest.digest != entry.digest:
        raise ConflictingArtifact(
            f"{entry.model_id} of run {entry.run_id!r} was written anew since it was promoted. Promote it again, or go "
            "back with `popalign rollback`."
        )


def merged_folder(workspace: Workspace, entry: ModelEntry) -> Path:
    """Where the denoiser with the adapter of a promoted model in it lies, once it was needed."""
    return workspace.root / "registry" / f"{entry.run_id}.{entry.model_id}.{entry.digest[:12]}"


def read_registry(workspace: Workspace) -> Registry:
    """The pointer and its history, empty before the first promotion. Raises: CorruptArtifact, WorkspaceTooNew."""
    path = workspace.root / REGISTRY
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text()))
        version = int(values["version"])
        moves = tuple(_move(move) for move in values["history"]) if version <= VERSION else ()
        current = _entry(values["current"]) if version <= VERSION else None
    except FileNotFoundError:
        return Registry(None, ())
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(
            f"{path} is not a model registry ({error!r}). Put back a copy, or remove it: the base model is then the "
            "current one, and models can be promoted again."
        ) from error
    if version > VERSION:
        raise WorkspaceTooNew(f"{path} has version {version}; this program knows up to {VERSION}. Update popalign.")
    return Registry(current, moves)


def current_model(workspace: Workspace) -> ModelEntry | None:
    """The promoted model; None is the base as configured. Raises: CorruptArtifact, WorkspaceTooNew."""
    return read_registry(workspace).current


def protected_models(workspace: Workspace) -> set[tuple[str, str]]:
    """(run_id, model_id) of the current model and of every one that ever was: what can be gone back to."""
    moves = read_registry(workspace).history
    return {(entry.run_id, entry.model_id) for move in moves for entry in (move.before, move.after) if entry}


@contextmanager
def registry_lock(workspace: Workspace) -> Generator[None]:
    """Holds the registry: nobody promotes meanwhile. Also for who removes weights that are not protected."""
    with exclusive(workspace.root / ".registry.lock"):
        yield


def set_current(workspace: Workspace, entry: ModelEntry, *, by: str, reason: str, forced: bool = False) -> Move | None:
    """Makes a model the current one; None, and nothing changed, if it is already.

    Raises: as `require_weights`, StorageFull.
    """
    with registry_lock(workspace):
        require_weights(workspace, entry)
        registry = read_registry(workspace)
        if registry.current == entry:
            return None
        move = Move("promote", _now(), by, reason, forced, registry.current, entry)
        _write(workspace, Registry(entry, (*registry.history, move)))
    return move


def roll_back(workspace: Workspace, *, to: str = "", by: str, reason: str = "") -> Move | None:
    """Goes back to the model before the current one, or to the nearest one of the run `to` ("base": to the base).

    None, and nothing changed, if that is the current one. Raises: NothingToRollBack; as `require_weights` of the
    earlier model; StorageFull.
    """
    with registry_lock(workspace):
        registry = read_registry(workspace)
        if to and to == (registry.current.run_id if registry.current else BASE):
            return None
        target = _earlier_model(registry, to)
        if target is not None:
            require_weights(workspace, target)
        move = Move("rollback", _now(), by, reason, False, registry.current, target)
        _write(workspace, Registry(target, (*registry.history, move)))
    return move


def _earlier_model(registry: Registry, to: str) -> ModelEntry | None:
    earlier = registry.earlier()
    if not earlier:
        raise NothingToRollBack("nothing is promoted: the base model as configured is the current one already.")
    if not to:
        return earlier[0]
    for entry in earlier:
        if to == (entry.run_id if entry else BASE):
            return entry
    known = ", ".join(entry.run_id if entry else BASE for entry in earlier)
    raise NothingToRollBack(
        f"run {to!r} is not among those before the current model; these are: {known}. `popalign promote` moves on to "
        "any other."
    )


def _write(workspace: Workspace, registry: Registry) -> None:
    path = workspace.root / REGISTRY
    # Under the lock nobody else is writing: what lies here was left by a crash.
    for draft in workspace.root.glob(f".{REGISTRY}~*"):
        draft.unlink(missing_ok=True)
    values = {"version": VERSION, **asdict(registry)}
    crash_point("after_stage", "registry")
    with disk_errors(path):
        write_in_one_step(path, (json.dumps(values, indent=1) + "\n").encode())
    crash_point("after_commit", "registry")


def _move(values: dict[str, Any]) -> Move:
    entries: dict[str, Any] = {side: _entry(values[side]) for side in ("before", "after")}
    return Move(**{**values, **entries})


def _entry(values: dict[str, Any] | None) -> ModelEntry | None:
    return None if values is None else ModelEntry(**values)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
