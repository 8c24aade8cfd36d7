"""Checkpoint folders: what is in them is checked before anything is loaded, and hashed to name what was measured."""

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.families import (
    FAMILIES,
    Family,
    check_networks,
    family_named,
    largest_side,
    size_step,
)

EMBEDDED = {
    "emoji": Path(__file__).parent / "emoji" / "pipeline",
    "emoji-clip": Path(__file__).parent / "emoji" / "judge-clip",
    "emoji-heads": Path(__file__).parent / "emoji" / "judge-residual",
}
# Before the path of a folder in the run's workspace, which may lie elsewhere on another host.
IN_WORKSPACE = "workspace:"
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def resolve_source(source: str) -> str:
    """The folder of an embedded model's name; any other folder or hub id as it is."""
    return str(EMBEDDED.get(source, source))


def is_path(source: str) -> bool:
    """Whether a source is meant as a folder, there or not, and cannot be a name or a hub id."""
    return source.startswith((".", "/", "~"))


def check_source(source: str, image_size: int = 0, scheduler: str = "") -> None:
    """What can be said of a model before it is loaded: a local folder is complete; image size and sampler fit it.

    image_size: pixels a side, 0 = the model's own. scheduler: a sampler's name, or empty. A hub id passes: only loading
    it shows what it is. Raises: ModelNotUsable, InvalidInput.
    """
    folder = Path(resolve_source(source))
    if not folder.exists():
        if is_path(source):
            raise ModelNotUsable(f"there is no model folder {source}. Embedded: emoji. A hub id is owner/name.")
        return
    family = check_pipeline_folder(folder)
    if scheduler:
        family.check_scheduler(scheduler)
    denoiser, vae = (read_config(folder / part / "config.json") for part in (family.denoiser, "vae"))
    check_image_size(image_size, image_size, size_step(family, denoiser, vae), largest_side(denoiser, vae))


def check_adapter(source: str) -> None:
    """A local folder of a LoRA holds safetensors; a hub id passes. Raises: ModelNotUsable."""
    folder = Path(source)
    if folder.is_dir():
        check_weights(folder)
    elif is_path(source):
        raise ModelNotUsable(f"there is no LoRA folder {source}. A hub id is owner/name.")


def check_cacheable(pipeline: str) -> None:
    """A local pipeline's UNet has an inner part that steps can share; a hub id passes. Raises: InvalidInput."""
    config = Path(resolve_source(pipeline)) / "unet" / "config.json"
    if config.is_file() and len(read_config(config).get("block_out_channels", ())) < 2:
        raise InvalidInput(
            f"sampling.approximate.cache_every shares the inner levels of a UNet between steps, and that of {pipeline} "
            "has one level only: leave it at 1."
        )


# What must be alike in a network and in the one whose place it takes.
_FITTING = (
    "_class_name",
    "in_channels",
    "cross_attention_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "patch_size",
    "joint_attention_dim",
    "pooled_projection_dim",
)


def check_unet(source: str, pipeline: str) -> None:
    """A folder holds a UNet or transformer in safetensors that fits the pipeline; one in the workspace passes.

    Raises: ModelNotUsable.
    """
    if source.startswith(IN_WORKSPACE):
        return
    folder = Path(source)
    if not folder.is_dir():
        raise ModelNotUsable(f"there is no folder {source}; save_pretrained of a UNet or transformer writes one.")
    check_weights(folder)
    config = read_config(folder / "config.json")
    networks = sorted({family.network for family in FAMILIES.values()})
    if config.get("_class_name") not in networks:
        raise ModelNotUsable(f"{folder} holds a {config.get('_class_name')}, expected {' or '.join(networks)}.")
    whole = Path(resolve_source(pipeline))
    if not whole.is_dir():
        return
    family = check_pipeline_folder(whole)
    own = read_config(whole / family.denoiser / "config.json")
    for name in _FITTING:
        if config.get(name) != own.get(name):
            raise ModelNotUsable(
                f"the {family.denoiser} in {folder} does not fit {pipeline}: its {name} is {config.get(name)!r}, the "
                f"pipeline's {own.get(name)!r}."
            )


def check_image_size(height: int, width: int, step: int, largest: int | None = None) -> None:
    """Raises: InvalidInput where a size in pixels is not divisible by the step, or beyond the largest side."""
    if height % step or width % step:
        raise InvalidInput(
            f"image size {height} x {width} is not divisible by {step}, which this model needs; "
            f"the nearest is {max(step, round(height / step) * step)} x {max(step, round(width / step) * step)}."
        )
    if largest is not None and max(height, width) > largest:
        raise InvalidInput(f"image size {height} x {width} is beyond the {largest} pixels a side of this model.")


def check_pipeline_folder(folder: Path) -> Family:
    """Refuses a folder that is no complete pipeline in safetensors of a family that is supported; returns the family.

    Raises: ModelNotUsable, naming what is missing or wrong.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelNotUsable(
            f"{folder} holds no model_index.json: a diffusers pipeline folder is expected "
            "(save_pretrained of a pipeline writes one)."
        )
    index = read_config(index_file)
    family = family_named(index.get("_class_name"), folder)
    absent = absent_parts(family, index)
    for part in family.parts:
        if part not in absent and not (folder / part).is_dir():
            raise ModelNotUsable(f"{folder} has no {part}/ folder, which a pipeline of {family.title} needs.")
    for part in family.weighted:
        if part not in absent:
            check_weights(folder / part)
    denoiser, vae = (read_config(folder / part / "config.json") for part in (family.denoiser, "vae"))
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    try:
        check_networks(family, denoiser, vae, scheduler)
    except ModelNotUsable as error:
        raise ModelNotUsable(f"{folder} cannot be used: {error}") from error
    return family


def absent_parts(family: Family, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The optional parts that a pipeline is without. index: its `model_index.json`, which has null for these."""
    return tuple(sorted(name for name in family.optional if not any(index.get(name) or ())))


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a JSON file of a model folder. Raises: ModelNotUsable where there are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotUsable(f"{path} cannot be read as JSON ({error}); it belongs to a model folder.") from error
    if not isinstance(found, dict):
        raise ModelNotUsable(f"{path} holds {type(found).__name__}, an object with settings is expected.")
    return cast("dict[str, Any]", found)


def check_weights(folder: Path) -> None:
    """Refuses a folder whose weights are missing or are pickles. Raises: ModelNotUsable."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ModelNotUsable(
            f"{folder} holds pickled weights ({', '.join(pickles)}), which can run code when loaded; "
            "convert them to safetensors first."
        )
    raise ModelNotUsable(f"{folder} holds no safetensors weights.")


@lru_cache(maxsize=64)
def folder_digest(folder: Path) -> str:
    """SHA-256 (16 hex digits) over names and bytes of a checkpoint folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def source_digest(source: str) -> str:
    """Digest of a local checkpoint folder, or of the name of a hub model, whose revision it does not know."""
    path = Path(resolve_source(source))
    return folder_digest(path) if path.is_dir() else hashlib.sha256(source.encode()).hexdigest()[:16]
