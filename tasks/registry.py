"""Which model is in use: lineage, promotion, the way back, and what the next run starts from."""

import getpass
import hashlib
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.models.checkpoints import IN_WORKSPACE, absent_parts, resolve_source
from popalign_core.models.export import adapts_text_encoders, export_weights, save_merged_denoiser
from popalign_core.models.loading import family_of
from popalign_core.models.sdxl import pipeline_index
from popalign_core.reporting.model_card import ExportedModel, render_model_card
from popalign_core.reporting.report_data import ReportData
from storage.artifacts import ArtifactRef, verify
from storage.catalog import VIEW, query, rebuild_catalog
from storage.errors import FolderInUse
from storage.folders import refuse_taken, staged_folder
from storage.layout import Workspace
from storage.locks import run_lock
from storage.registry import (
    ModelEntry,
    Move,
    current_model,
    merged_folder,
    model_entry,
    require_weights,
    roll_back,
    set_current,
)
from storage.tables import read_artifact, read_rows
from tasks.run import BASE, model_source, placed, run_config

README = "README.md"
NOT_RECORDED = "not recorded"


class NotPromotable(InvalidInput):
    """A model was not assessed, or held, and so does not become the current one."""


def lineage(ref: ArtifactRef, config: RunConfig) -> dict[str, str]:
    """The columns of `models` that say what a model was made from; the same for a run that was resumed."""
    return {
        "base_model": " + ".join(part for part in (config.model, config.model_lora, config.model_unet) if part),
        "base_digest": model_source(ref.workspace, ref.run_id, config, BASE).digest(),
        "config_digest": hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16],
        "data_run_id": ref.run_id,
    }


def promote_model(
    workspace: str, run_id: str, model_id: str = "", *, force: bool = False, reason: str = ""
) -> Move | None:
    """Makes a decided model of a run the current one; None, and nothing changed, if it is already.

    model_id: empty = the one that the run decided on. force: a held one as well, for the reason given.
    Raises: NotPromotable, InvalidInput; RunInUse while the run goes on; RemovedArtifact, CorruptArtifact.
    """
    place = Workspace.open(workspace)
    decision = _decision(place, run_id, model_id)
    held = decision["verdict"] != "promote"
    if held and not force:
        raise NotPromotable(
            f"{decision['model_id']} of run {run_id!r} is held: {decision['reason']} To promote it all the same, give "
            "--force --reason TEXT; the reason is kept in the registry."
        )
    if held and not reason.strip():
        raise InvalidInput("--force needs --reason TEXT: why a held model is promoted is kept in the registry.")
    with run_lock(place, run_id):  # `popalign gc` does not remove what is being promoted
        entry = model_entry(place, run_id, str(decision["model_id"]))
        verify(entry.reference(place))
        said = reason.strip() or str(decision["reason"])
        move = set_current(place, entry, by=_who(), reason=said, forced=held)
    rebuild_catalog(place)
    return move


def rollback_model(workspace: str, to: str = "", *, reason: str = "") -> Move | None:
    """Goes back to the model before the current one, or to that of the run `to`, or to the base ("base").

    None, and nothing changed, if `to` names the current one. Raises: NothingToRollBack, and as `require_weights`.
    """
    place = Workspace.open(workspace)
    move = roll_back(place, to=to, by=_who(), reason=reason.strip())
    rebuild_catalog(place)
    return move


def listed_models(workspace: str) -> list[dict[str, Any]]:
    """The rows of `model_registry`, by run and round."""
    place = Workspace.open(workspace)
    rebuild_catalog(place)
    return query(place, f"FROM {VIEW} ORDER BY run_id, round").to_pylist()


def starting_config(workspace: str, config: RunConfig) -> RunConfig:
    """The configuration with the promoted model as its base model; unchanged if none is promoted.

    Folders are named relative to the workspace. An adapter that was trained on an adapted base is merged, once.
    Raises: InvalidInput if the promoted model is of another pipeline; as `require_weights`.
    """
    place = Workspace.open(workspace)
    entry = current_model(place)
    if entry is None:
        return config
    own = run_config(workspace, entry.run_id)
    if own.model != config.model:
        raise InvalidInput(
            f"the current model, {entry.model_id} of run {entry.run_id!r}, belongs to {own.model!r}, and the "
            f"configuration names {config.model!r}. Name the same model, start from the base as configured, take "
            "another workspace, or go back with `popalign rollback --to base`."
        )
    require_weights(place, entry)
    if entry.adapter == "lora" and not own.model_lora and not own.model_unet:
        return config.model_copy(update={"model_lora": _in_workspace(place, entry.weights(place)), "model_unet": ""})
    unet = entry.weights(place) if entry.adapter == "full" else _merged_denoiser(place, entry, own)
    # The UNet holds what the LoRA of its base adds; the text encoders of the pipeline do not.
    kept = own.model_lora if own.model_lora and adapts_text_encoders(placed(workspace, own.model_lora)) else ""
    return config.model_copy(update={"model_lora": kept, "model_unet": _in_workspace(place, unet)})


def _in_workspace(place: Workspace, folder: Path) -> str:
    return IN_WORKSPACE + folder.relative_to(place.root).as_posix()


def _merged_denoiser(place: Workspace, entry: ModelEntry, config: RunConfig) -> Path:
    folder = merged_folder(place, entry)
    if not folder.is_dir():
        source = model_source(str(place.root), entry.run_id, config, entry.model_id)
        # Another process may be quicker, with the same.
        with suppress(FolderInUse), staged_folder(folder) as staged:
            save_merged_denoiser(source, staged)
    return next(part for part in folder.iterdir() if part.is_dir())


def export_model(workspace: str, run_id: str, model_id: str = "", folder: Path | None = None) -> Path:
    """Writes a trained model and its card into a new folder, which plain diffusers opens; returns the folder.

    model_id: empty = the one that the run decided on. folder: empty = <run>.<model> in the current one.
    Raises: NotPromotable without a decision and a model_id; FolderInUse, RemovedArtifact, CorruptArtifact, StorageFull.
    """
    place = Workspace.open(workspace)
    config = run_config(workspace, run_id)
    model_id = model_id or str(_decision(place, run_id, "")["model_id"])
    target = (folder or Path(f"{run_id}.{model_id}")).expanduser().absolute()
    refuse_taken(target)
    entry = model_entry(place, run_id, model_id)
    verify(entry.reference(place))
    source = model_source(workspace, run_id, config, model_id)
    with staged_folder(target) as staged:
        form = export_weights(source, staged)
        pipeline, family = resolve_source(config.model), family_of(config.model)
        exported = ExportedModel(
            form=form,
            pipeline=str(Path(pipeline).absolute()) if Path(pipeline).is_dir() else pipeline,
            base_model=config.model,
            lineage=_lineage_rows(entry, place),
            family=family,
            # A whole pipeline has what it has in its own index.
            absent=absent_parts(family, pipeline_index(config.model)),
        )
        card = render_model_card(_card_data(place, run_id, model_id, config), exported)
        (staged / README).write_text(card, encoding="utf-8")
    return target


def _decision(place: Workspace, run_id: str, model_id: str) -> dict[str, Any]:
    """The run's decision on a model, or its only one. Raises: NotCommitted without the run; NotPromotable."""
    run_config(str(place.root), run_id)
    decisions = read_rows(place, run_id, "decisions")
    found = [row for row in decisions if not model_id or row["model_id"] == model_id]
    if len(found) == 1:
        return found[0]
    decided = ", ".join(row["model_id"] for row in decisions)
    raise NotPromotable(
        f"run {run_id!r} has no decision on {model_id or 'one model'}; it decided on {decided}: name one by --model."
        if decided
        else f"run {run_id!r} has no decision yet. Run it to its end under the same run id: only what was measured on "
        "held-out prompts can be promoted."
    )


def _lineage_rows(entry: ModelEntry, place: Workspace) -> list[tuple[str, str]]:
    row = read_artifact(entry.reference(place), "models")[0]
    names = {"base_model": "Base model", "base_digest": "Base weights", "config_digest": "Configuration"}
    names["data_run_id"] = "Images of run"
    recorded = [(title, str(row[column] or NOT_RECORDED)) for column, title in names.items()]
    return [("Run", entry.run_id), ("Model", entry.model_id), *recorded, ("Artifact", entry.digest)]


def _card_data(place: Workspace, run_id: str, model_id: str, config: RunConfig) -> ReportData:
    names = ("prompts", "disparities", "comparisons", "scores", "models")
    rows: dict[str, Any] = {name: read_rows(place, run_id, name) for name in names}
    decided = read_rows(place, run_id, "decisions", equal={"model_id": model_id})
    starts = read_rows(place, run_id, "starts")
    compared = [row for row in rows["comparisons"] if row["model_id"] == model_id]
    # As the rows say: loading the classifiers for their names would take longer than the export.
    said_by = {row["measure"]: str(row["judge_id"]) for row in compared}
    return ReportData(
        run_id=run_id,
        created=starts[0]["started_at"] if starts else NOT_RECORDED,
        config=config.model_dump(mode="json"),
        versions=json.loads(starts[-1]["versions_json"]) if starts else {},
        base_model_id=BASE,
        model_id=model_id,
        judge_id=said_by.get("l2", ""),
        builder_id=said_by.get("clip_score", ""),
        decision=decided[-1] if decided else None,
        **rows,
    )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
