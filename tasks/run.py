"""What every task needs of a run: its references, its models, its record of time."""

import gc
import json
import platform
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext

from popalign_core.acceleration import Acceleration, VaeDtype
from popalign_core.config import AccelerationConfig, ClassificationConfig, RunConfig, SamplingConfig, parse_config
from popalign_core.detection import Kind
from popalign_core.expansion import Prompt
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.checkpoints import IN_WORKSPACE, source_digest
from popalign_core.models.detectors import BoxDetector
from popalign_core.models.inference import Dtype
from popalign_core.models.loading import load_model
from popalign_core.models.sdxl import ModelSource
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.sampling import SamplingSettings
from popalign_core.target_shares import load_targets
from storage.artifacts import ArtifactRef, is_committed, require_present
from storage.commit import staged_artifact
from storage.errors import NotCommitted
from storage.layout import Workspace
from storage.leftovers import remove_leftovers
from storage.registry import weights_part
from storage.retention import check_complete
from storage.tables import read_rows, write_rows
from tasks.versions import code_version

BASE = "base"
UNCHANGED = AccelerationConfig()
LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "peft",
    "torchmetrics",
    "numpy",
    "prefect",
    "duckdb",
    "pyarrow",
)


def reference(workspace: str, run_id: str, table: str, key: str) -> ArtifactRef:
    """A reference with an absolute workspace."""
    return ArtifactRef(str(Workspace.open(workspace).root), run_id, table, key)


def record_run(workspace: str, run_id: str, preset: str, config: RunConfig) -> ArtifactRef:
    """Removes what a crash left of the run, and commits what it was asked for and that it was started.

    An upgrade of a library is no other run.

    Raises: ConflictingArtifact if the id names another configuration; RemovedArtifact if it cannot go on;
    TargetNotUsable.
    """
    load_targets(config.assessment.targets)
    place = Workspace.open(workspace)
    check_complete(place, run_id)
    remove_leftovers(place, run_id)
    ref = reference(workspace, run_id, "runs", "config")
    # A setting that came with an upgrade has its default in the runs of before.
    if not is_committed(ref) or run_config(workspace, run_id) != config:
        with staged_artifact(ref) as folder:
            row = {"run_id": run_id, "preset": preset, "config_json": config.model_dump_json()}
            write_rows(folder, "runs", [row])
    now = datetime.now(UTC)
    start = reference(workspace, run_id, "starts", now.strftime("%Y%m%dT%H%M%S.%fZ"))
    with staged_artifact(start) as folder:
        versions = json.dumps({"python": platform.python_version(), "popalign": code_version()} | _library_versions())
        row = {"run_id": run_id, "started_at": now.isoformat(timespec="seconds"), "versions_json": versions}
        write_rows(folder, "starts", [row])
    return ref


def _library_versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def run_config(workspace: str, run_id: str, given: RunConfig | None = None) -> RunConfig:
    """The configuration given, else the one the run was started with. Raises: NotCommitted."""
    if given is not None:
        return given
    place = Workspace.open(workspace)
    rows = read_rows(place, run_id, "runs")
    if not rows:
        known = ", ".join(place.run_ids()) or "none"
        raise NotCommitted(
            f"there is no run {run_id!r} in {place.root}; runs there: {known}. The expansion starts one."
        )
    return parse_config(json.loads(rows[0]["config_json"]))


def read_prompts(workspace: str, run_id: str) -> list[Prompt]:
    """The run's prompts, in their order. Raises: NotCommitted before the expansion."""
    rows = read_rows(Workspace.open(workspace), run_id, "prompts")
    if not rows:
        raise NotCommitted(f"run {run_id} has no prompts yet: run the expansion first.")
    return [Prompt(**{name: value for name, value in row.items() if name != "run_id"}) for row in rows]


def model_source(workspace: str, run_id: str, config: RunConfig, model_id: str) -> ModelSource:
    """Where a run's model lies: the configured pipeline, with the round's trained weights for any other id.

    Raises: NotCommitted, RemovedArtifact.
    """
    base = ModelSource(
        config.model,
        unet=placed(workspace, config.model_unet) or None,
        fused_lora=placed(workspace, config.model_lora) or None,
    )
    if model_id == BASE:
        return base
    ref = reference(workspace, run_id, "models", model_id)
    if not is_committed(ref):
        raise NotCommitted(f"run {run_id} has no committed model {model_id!r}.")
    adapter = "lora" if config.alignment.lora_rank else "full"
    part = weights_part(ref, adapter)
    require_present(ref, part)
    return replace(base, **{"lora" if adapter == "lora" else "unet": str(ref.folder / part)})


def drawing_source(workspace: str, run_id: str, config: RunConfig, model_id: str) -> ModelSource:
    """The run's model as the sampler loads it; training and export take it without the approximations.

    Raises: NotCommitted, RemovedArtifact.
    """
    approximate = config.sampling.approximate
    return replace(
        model_source(workspace, run_id, config, model_id),
        distilled_lora=placed(workspace, approximate.distilled_lora) or None,
        fp8_weights=approximate.fp8_weights,
    )


def placed(workspace: str, source: str) -> str:
    """Where the folder of a configuration lies on this host; what is not in the workspace stays as it is."""
    if not source.startswith(IN_WORKSPACE):
        return source
    return str(Workspace.open(workspace).root / source.removeprefix(IN_WORKSPACE))


class OneModel:
    """One text-to-image model in memory at a time; shards of the same model reuse it."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._model: TextToImageModel | None = None

    def __call__(self, source: ModelSource, device: str, dtype: Any, vae_dtype: VaeDtype = "model") -> TextToImageModel:
        """See `load_model`. The model before leaves first: there may be no room for two."""
        key = (source, device, dtype, vae_dtype)
        if self._model is None or self._key != key:
            self.cache_clear()
            self._key, self._model = key, load_model(source, device=device, dtype=dtype, vae_dtype=vae_dtype)
        return self._model

    def cache_clear(self) -> None:
        """Leaves none in memory, and gives what torch keeps of a GPU's back."""
        self._key, self._model = (), None
        gc.collect()  # hooks and compiled code make circles
        torch.cuda.empty_cache()

    def bytes_on(self, device: torch.device) -> int:
        """What the model's weights take there."""
        place = torch.empty(0, device=device).device  # with its number
        parts = [getattr(self._model.pipeline, name) for name in self._model.family.weighted] if self._model else []
        weights = (weight for part in parts if part is not None for weight in part.parameters())
        return sum(weight.numel() * weight.element_size() for weight in weights if weight.device == place)


loaded_model = OneModel()


@lru_cache(maxsize=2)
def _builder(source: str, device: str, dtype: Dtype) -> ZeroShotClassifier:
    return ZeroShotClassifier(source, device=device, dtype=dtype)


@lru_cache(maxsize=2)
def _judge(source: str, device: str, dtype: Dtype) -> HeadClassifier:
    return HeadClassifier(source, device=device, dtype=dtype)


def builder(config: ClassificationConfig, device: str) -> ZeroShotClassifier:
    """The classifier that builds preferences; in memory once."""
    return _builder(config.builder, device, config.dtype)


def judge(config: ClassificationConfig, device: str) -> HeadClassifier:
    """The classifier that judges the assessment; in memory once."""
    return _judge(config.judge, device, config.dtype)


def classifier_of(role: str, config: ClassificationConfig, device: str) -> ZeroShotClassifier | HeadClassifier:
    """The builder or the judge."""
    return builder(config, device) if role == "builder" else judge(config, device)


@lru_cache(maxsize=2)
def detector(source: str, kind: Kind, min_confidence: float, device: str) -> BoxDetector:
    """Finds persons, or faces."""
    return BoxDetector(source, kind, min_confidence=min_confidence, device=device)


def sampling_settings(config: SamplingConfig, acceleration: AccelerationConfig = UNCHANGED) -> SamplingSettings:
    """Two parts of the configuration as plain values, with what is really used of an approximate sampler."""
    return SamplingSettings(
        scheduler=config.drawn_scheduler,
        steps=config.drawn_steps,
        guidance_scale=config.drawn_guidance,
        height=config.image_size,
        width=config.image_size,
        batch_size=config.batch_size,
        dtype=config.dtype,
        attention=config.attention,
        acceleration=Acceleration(**acceleration.model_dump(exclude={"encoding_threads"})),
        cache_every=config.approximate.cache_every,
        fp8_weights=config.approximate.fp8_weights,
        distilled_lora=source_digest(config.approximate.distilled_lora) if config.approximate.distilled_lora else "",
    )


async def passes(_task: object, _run: object, state: State[object]) -> bool:
    """Retries what may pass: input and output. Never a configuration, a schema or a number that is none."""
    return isinstance(await state.aresult(raise_on_failure=False), OSError)


@contextmanager
def timed(ref: ArtifactRef, stage: str, device: str) -> Generator[dict[str, int | None]]:
    """Commits how long a piece of work took; set `items`, and `peak_bytes` where it is known, in the mapping."""
    started = time.monotonic()
    facts: dict[str, int | None] = {"items": 0}
    yield facts
    row = {
        "run_id": ref.run_id,
        "stage": stage,
        "key": f"{ref.table}/{ref.key}",
        "seconds": time.monotonic() - started,
        "items": facts["items"],
        "device": device,
        "peak_bytes": facts.get("peak_bytes"),
        "ended_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    timing = ArtifactRef(ref.workspace, ref.run_id, "timings", f"{ref.table}-{ref.key}")
    if not is_committed(timing):
        with staged_artifact(timing) as folder:
            write_rows(folder, "timings", [row])


def as_row(run_id: str, value: Any, **more: Any) -> dict[str, Any]:
    """A frozen dataclass as a table row."""
    return {"run_id": run_id, **asdict(value), **more}


@contextmanager
def run_tags(preset: str, config: RunConfig) -> Generator[None]:
    """Tags the current flow run, and what is started inside, with the preset and the model, to filter by."""
    names = [f"preset:{preset}", f"model:{config.model}"]
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(context.flow_run.id, tags=sorted({*context.flow_run.tags, *names}))
    with tags("popalign", *names):
        yield
