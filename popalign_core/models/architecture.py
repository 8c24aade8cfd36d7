"""What a model is made of, from its configuration files; its networks are built on meta tensors, without weights."""

import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
from safetensors import safe_open

from popalign_core.models.checkpoints import is_path, read_config, resolve_source

SDXL = Path(__file__).with_name("sdxl_base.json")
TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Architecture:
    """unet, vae: configurations as JSON text. text_elements: of both text encoders. source: where they come from."""

    unet: str
    vae: str
    text_elements: int
    source: str

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent position along each side."""
        return 2 ** (len(json.loads(self.vae)["block_out_channels"]) - 1)

    @property
    def native_side(self) -> int:
        """Pixels a side that the UNet was trained at."""
        return int(json.loads(self.unet)["sample_size"]) * self.pixels_per_latent

    def latent_side(self, side: int) -> int:
        """Latent positions along each side of an image. side: its pixels, 0 = the model's own."""
        return (side or self.native_side) // self.pixels_per_latent

    def latent_elements(self, side: int) -> int:
        """Of the latents of one image. side: its pixels, 0 = the model's own."""
        return int(json.loads(self.vae)["latent_channels"]) * self.latent_side(side) ** 2


@lru_cache(maxsize=8)
def architecture_of(model: str) -> Architecture:
    """Of an embedded name, a pipeline folder, or a hub id whose configuration can be had; else SDXL's, and it says so.

    Raises: ModelNotUsable where a folder's configuration is not readable.
    """
    folder = Path(resolve_source(model))
    if folder.is_dir():
        unet, vae = (json.dumps(read_config(folder / part / "config.json"), sort_keys=True) for part in ("unet", "vae"))
        texts = sum(_elements(folder / part) for part in ("text_encoder", "text_encoder_2"))
        return Architecture(unet, vae, texts, "the model's files")
    known = read_config(SDXL)
    texts = int(known["text_elements"])
    if not is_path(model):
        try:
            unet, vae = (json.dumps(read_config(_from_hub(model, part)), sort_keys=True) for part in ("unet", "vae"))
            return Architecture(unet, vae, texts, f"the configuration of {model}")
        # Whatever keeps the hub away: the plan is then of the known model.
        except (OSError, ValueError):
            pass
    unet, vae = (json.dumps(known[part], sort_keys=True) for part in ("unet", "vae"))
    return Architecture(unet, vae, texts, "SDXL's configuration, as shipped")


def _from_hub(model: str, part: str) -> Path:
    return Path(hf_hub_download(model, "config.json", subfolder=part, etag_timeout=TIMEOUT_SECONDS))


def _elements(folder: Path) -> int:
    """Of all weights in a folder's safetensors, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with cast("Any", safe_open(path, "numpy")) as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def meta_unet(config: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_settings(config))
    torch.nn.Module.to(unet, dtype)  # diffusers' own warns that nothing stays in float32
    return unet


def meta_vae(config: str, dtype: torch.dtype) -> AutoencoderKL:
    """An autoencoder without weights."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(_settings(config))
    torch.nn.Module.to(vae, dtype)
    return vae


def _settings(config: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(config))
