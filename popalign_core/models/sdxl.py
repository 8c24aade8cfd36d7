"""SDXL checkpoints through diffusers: one loader for the embedded model, a local folder and a hub id."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import Tensor

from popalign_core.acceleration import VaeDtype
from popalign_core.devices import device_name
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.checkpoints import (
    check_image_size,
    check_pipeline_folder,
    check_weights,
    resolve_source,
    source_digest,
)
from popalign_core.models.lora import FILE_NAME as LORA_FILE
from popalign_core.models.prompt_embeddings import PromptEmbeddings, PromptEncoder

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SchedulerName = Literal["ddim", "euler", "dpm++"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a pipeline (embedded name, folder or hub id), and what replaces or adapts its UNet.

    fused_lora: folder or hub id of a LoRA that belongs to the base model: added to its weights, text encoders included.
    unet: folder of a UNet in the place of the pipeline's, in which that LoRA is already. lora: an adapter on top.
    """

    pipeline: str
    unet: str | None = None
    lora: str | None = None
    fused_lora: str | None = None

    def digest(self) -> str:
        """Names the weights: digests of all folders involved."""
        return "-".join(
            source_digest(part) for part in (self.pipeline, self.fused_lora, self.unet, self.lora) if part is not None
        )


class SdxlModel:
    """A loaded SDXL pipeline on a device. Frozen: nothing here changes its weights."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, source: ModelSource, device: torch.device):
        self.pipeline = pipeline
        self.source = source
        self.device = device

    @cached_property
    def prompts(self) -> PromptEncoder:
        """Its text encoders."""
        surroundings = {name: version(name) for name in ("torch", "transformers", "diffusers")}
        return PromptEncoder(self.pipeline, self.device, surroundings | {"device": device_name(self.device)})

    def encode_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """Embeddings of at least one prompt, on the CPU in the model's dtype, each encoded once."""
        return self.prompts.encode(texts)

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent position along each side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def native_size(self) -> int:
        """Image side in pixels at which the UNet was trained."""
        return int(self.pipeline.unet.config.sample_size) * self.pixels_per_latent

    def check_size(self, height: int, width: int) -> None:
        """Raises: InvalidInput where the size does not fit the latent grid and the UNet's levels."""
        vae, unet = self.pipeline.vae.config, self.pipeline.unet.config
        check_image_size(height, width, len(vae.block_out_channels), len(unet.block_out_channels))

    @property
    def has_zero_unconditional(self) -> bool:
        """Whether zeros stand for "no prompt", as in SDXL."""
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def encode_unconditional(self) -> PromptEmbeddings:
        """What stands for "no prompt": zeros where the pipeline says so, else the empty string's embedding."""
        empty = self.encode_prompts([""])
        if self.has_zero_unconditional:
            return PromptEmbeddings(torch.zeros_like(empty.context), torch.zeros_like(empty.pooled))
        return empty

    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings of captions and of the empty one, in float32, by the names of `AlignmentData`."""
        embeddings, empty = self.encode_prompts(texts), self.encode_unconditional()
        return {
            "prompt_embeddings": embeddings.context.float(),
            "pooled": embeddings.pooled.float(),
            "empty_prompt_embedding": empty.context[0].float(),
            "empty_pooled": empty.pooled[0].float(),
        }

    def time_ids(self, height: int, width: int) -> Tensor:
        """SDXL's size conditions (1, 6): original size, crop corner, target size."""
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latent moments of images: mean and deviation, each (n, c, h, w), on the CPU in float32.

        pixels: float (n, 3, h, w) in [-1, 1].
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        factor, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        return ((posterior.mean - shift) * factor).float().cpu(), (posterior.std * factor).float().cpu()


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first accelerator, else the CPU. Raises: InvalidInput."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidInput(f"device is {name!r}, which cannot be used here: {reason} Try auto or cpu.") from error
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def load_sdxl(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32", vae_dtype: VaeDtype = "model"
) -> SdxlModel:
    """Loads a pipeline in safetensors, with the LoRAs and the UNet that the source names.

    vae_dtype: model = like the rest; where that is float16 and the VAE overflows in it, float32.
    Raises: ModelNotUsable with the reason and the way out.
    """
    replacement = None
    if source.unet is not None:
        check_weights(Path(source.unet))
        replacement = UNet2DConditionModel.from_pretrained(source.unet, dtype=DTYPES[dtype], use_safetensors=True)
    # A LoRA is fused into the pipeline's own UNet, so that one has to be loaded first.
    early = replacement if source.fused_lora is None else None
    pipeline = _load_pipeline(source.pipeline, early, dtype, vae_dtype)
    if source.fused_lora is not None:
        _load_lora(pipeline, source.fused_lora)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        if replacement is not None:
            pipeline.register_modules(unet=replacement)
    if source.lora is not None:
        _load_lora(pipeline, source.lora)
    place = pick_device(device)
    if vae_dtype == "model" and dtype == "float16" and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # as diffusers does for each decoding
    # The text encoders stay in main memory: see PromptEncoder.
    for part in (pipeline.unet, pipeline.vae):
        part.to(place, memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval().requires_grad_(False)
    return SdxlModel(pipeline, source, place)


def _load_pipeline(
    source: str, unet: UNet2DConditionModel | None, dtype: DtypeName, vae_dtype: VaeDtype
) -> StableDiffusionXLPipeline:
    resolved = resolve_source(source)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    if vae_dtype not in ("model", dtype):
        options["dtype"] = {"vae": DTYPES[vae_dtype], "default": DTYPES[dtype]}
    if unet is not None:
        options["unet"] = unet
    if Path(resolved).exists():
        check_pipeline_folder(Path(resolved))
    try:
        return StableDiffusionXLPipeline.from_pretrained(resolved, add_watermarker=False, **options)
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as an SDXL pipeline: {error}. Give an embedded name, the path of "
            "a pipeline folder, or a hub id that this machine can reach or has in its cache."
        ) from error


def _load_lora(pipeline: StableDiffusionXLPipeline, source: str) -> None:
    try:
        pipeline.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as a LoRA: {str(error).splitlines()[0]} Give a folder with "
            f"{LORA_FILE}, or a hub id that this machine can reach or has in its cache."
        ) from error
