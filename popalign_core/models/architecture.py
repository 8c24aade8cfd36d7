"""What a model is made of, from its configuration files; its networks are built on meta tensors, without weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

from popalign_core.errors import PopalignError
from popalign_core.models.checkpoints import absent_parts, is_path, read_config, resolve_source
from popalign_core.models.families import SDXL, Family, family_named
from popalign_core.models.lora import Network

SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
SHIPPED = Path(__file__).with_name("sdxl_base.json")
TIMEOUT_SECONDS = 5.0
_LATENT_CHANNELS = 4


class ArchitectureUnknown(PopalignError):
    """What a model is made of cannot be told here, so its memory and arithmetic are not counted."""

    template = (
        "memory and arithmetic are not counted for {model}: its configuration is not here. They are once it is in this "
        "machine's cache of the hub, or where model is its folder."
    )


@dataclass(frozen=True)
class Architecture:
    """denoiser, vae: configurations as JSON text. text_elements: of all text encoders. source: where they come from."""

    family: Family
    denoiser: str
    vae: str
    text_elements: int
    source: str

    @property
    def denoiser_name(self) -> str:
        """What people call the part that predicts."""
        return "UNet" if self.family.denoiser == "unet" else self.family.denoiser

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent position along each side."""
        return 2 ** (len(json.loads(self.vae)["block_out_channels"]) - 1)

    @property
    def native_side(self) -> int:
        """Pixels a side that the denoiser was trained at."""
        return int(json.loads(self.denoiser)["sample_size"]) * self.pixels_per_latent

    def latent_side(self, side: int) -> int:
        """Latent positions along each side of an image. side: its pixels, 0 = the model's own."""
        return (side or self.native_side) // self.pixels_per_latent

    def latent_elements(self, side: int) -> int:
        """Of the latents of one image. side: its pixels, 0 = the model's own."""
        return int(json.loads(self.vae).get("latent_channels", _LATENT_CHANNELS)) * self.latent_side(side) ** 2


def architecture_of(model: str) -> Architecture:
    """Of an embedded name, a pipeline folder, or a hub id whose configuration can be had. SDXL's is shipped.

    Raises: ModelNotUsable where a configuration is not readable or of no family; ArchitectureUnknown.
    """
    folder = Path(resolve_source(model))
    if folder.is_dir():
        return _of_folder(folder)
    found = None if is_path(model) else _of_hub(model)
    if found is None:
        raise ArchitectureUnknown(model=model)
    return found


@lru_cache(maxsize=8)
def _of_folder(folder: Path) -> Architecture:
    return _read(lambda name: read_config(folder / name), folder, "the model's files")


@lru_cache(maxsize=8)
def _of_hub(model: str) -> Architecture | None:
    try:
        return _read(lambda name: read_config(_from_hub(model, name)), model, f"the configuration of {model}")
    except (OSError, ValueError):  # whatever keeps the hub away
        return sdxl_as_shipped() if model == SDXL_ID else None


def _from_hub(model: str, name: str) -> Path:
    # What is shipped is looked for in the cache alone: a hub out of reach is tried six times, in half a minute.
    shipped = model == SDXL_ID
    return Path(hf_hub_download(model, name, etag_timeout=TIMEOUT_SECONDS, local_files_only=shipped))


def sdxl_as_shipped() -> Architecture:
    """SDXL's, without its files."""
    known = read_config(SHIPPED)
    denoiser, vae = (json.dumps(known[part], sort_keys=True) for part in ("unet", "vae"))
    return Architecture(SDXL, denoiser, vae, int(known["text_elements"]), "SDXL's configuration, as shipped")


def _read(read: Callable[[str], dict[str, Any]], model: object, source: str) -> Architecture:
    """read: the settings in a file of the model, by the file's name in it."""
    index = read("model_index.json")
    family = family_named(index.get("_class_name"), model)
    denoiser, vae = (json.dumps(read(f"{part}/config.json"), sort_keys=True) for part in (family.denoiser, "vae"))
    encoders = [part for part in family.text_encoders if part not in absent_parts(family, index)]
    texts = sum(_text_elements(index, part, read(f"{part}/config.json")) for part in encoders)
    return Architecture(family, denoiser, vae, texts, source)


def _text_elements(index: Mapping[str, Any], part: str, config: dict[str, Any]) -> int:
    """Of a text encoder as it will be loaded: its folder may hold the weights more than once, in several formats."""
    kind = getattr(transformers, index[part][1])
    with torch.device("meta"):
        encoder = kind(kind.config_class.from_dict(config))
    return sum(parameter.numel() for parameter in encoder.parameters())


def meta_denoiser(model: Architecture, dtype: torch.dtype) -> Network:
    """The UNet or transformer without weights."""
    with torch.device("meta"):
        network = getattr(diffusers, model.family.network).from_config(json.loads(model.denoiser))
    torch.nn.Module.to(network, dtype)  # diffusers' own warns that nothing stays in float32
    return network


def meta_vae(model: Architecture, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder without weights."""
    kind: Any = AutoencoderKL
    with torch.device("meta"):
        vae = kind.from_config(json.loads(model.vae))
    torch.nn.Module.to(vae, dtype)
    return vae
