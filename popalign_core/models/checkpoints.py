"""Checkpoint folders: what is in them is checked before anything is loaded, and hashed to name what was measured."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from popalign_core.errors import InvalidInput, ModelNotUsable

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


def check_source(source: str, image_size: int = 0) -> None:
    """What can be said of a model before it is loaded: a local folder is complete, and the image size fits it.

    image_size: pixels a side, 0 = the model's own. A hub id passes: only loading it shows what it is.
    Raises: ModelNotUsable, InvalidInput.
    """
    folder = Path(resolve_source(source))
    if not folder.exists():
        if is_path(source):
            raise ModelNotUsable(f"there is no model folder {source}. Embedded: emoji. A hub id is owner/name.")
        return
    check_pipeline_folder(folder)
    unet, vae = (read_config(folder / part / "config.json") for part in ("unet", "vae"))
    check_image_size(image_size, image_size, len(vae["block_out_channels"]), len(unet["block_out_channels"]))


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


def check_unet(source: str, pipeline: str) -> None:
    """A folder holds an SDXL UNet in safetensors that fits the pipeline; one in the workspace passes.

    Raises: ModelNotUsable.
    """
    if source.startswith(IN_WORKSPACE):
        return
    folder = Path(source)
    if not folder.is_dir():
        raise ModelNotUsable(f"there is no UNet folder {source}; UNet2DConditionModel.save_pretrained writes one.")
    check_weights(folder)
    config = read_config(folder / "config.json")
    if config.get("addition_embed_type") != "text_time":
        raise ModelNotUsable(f"{folder} is no UNet of SDXL: its addition_embed_type is not 'text_time'.")
    whole = Path(resolve_source(pipeline))
    own = read_config(whole / "unet" / "config.json") if whole.is_dir() else config
    for name in ("in_channels", "cross_attention_dim", "projection_class_embeddings_input_dim"):
        if config.get(name) != own.get(name):
            raise ModelNotUsable(
                f"the UNet in {folder} does not fit {pipeline}: its {name} is {config.get(name)}, the pipeline's "
                f"{own.get(name)}."
            )


def check_image_size(height: int, width: int, vae_levels: int, unet_levels: int) -> None:
    """Raises: InvalidInput where a size in pixels does not fit the latent grid and the UNet's levels."""
    step = 2 ** (vae_levels - 1 + unet_levels - 1)
    if height % step or width % step:
        raise InvalidInput(
            f"image size {height} x {width} is not divisible by {step}, which this model needs; "
            f"the nearest is {max(step, round(height / step) * step)} x {max(step, round(width / step) * step)}."
        )


def check_pipeline_folder(folder: Path) -> None:
    """Refuses a folder that is no complete SDXL pipeline in safetensors.

    Raises: ModelNotUsable, naming what is missing or wrong.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ModelNotUsable(
            f"{folder} holds no model_index.json: a diffusers pipeline folder is expected "
            "(StableDiffusionXLPipeline.save_pretrained writes one)."
        )
    parts = read_config(index_file)
    if parts.get("_class_name") != "StableDiffusionXLPipeline":
        raise ModelNotUsable(
            f"{folder} is a {parts.get('_class_name')}; StableDiffusionXLPipeline is the architecture supported."
        )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        if not (folder / part).is_dir():
            raise ModelNotUsable(f"{folder} has no {part}/ folder, which an SDXL pipeline needs.")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        check_weights(folder / part)
    config = read_config(folder / "unet" / "config.json")
    if config.get("addition_embed_type") != "text_time":
        raise ModelNotUsable(
            f"{folder}/unet takes no pooled text and size conditions (addition_embed_type "
            f"{config.get('addition_embed_type')!r}); an SDXL UNet has 'text_time'."
        )


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
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def source_digest(source: str) -> str:
    """Digest of a local checkpoint folder, or of the name of a hub model."""
    path = Path(resolve_source(source))
    return folder_digest(path) if path.is_dir() else hashlib.sha256(source.encode()).hexdigest()[:16]
