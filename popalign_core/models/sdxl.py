"""SDXL checkpoints through diffusers: one loader for the embedded model, a local folder and a hub id."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import Tensor

from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.approximate import store_in_fp8
from popalign_core.models.checkpoints import (
    check_image_size,
    check_pipeline_folder,
    check_weights,
    resolve_source,
    source_digest,
)
from popalign_core.models.lora import FILE_NAME as LORA_FILE

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SchedulerName = Literal["ddim", "euler", "dpm++", "lcm"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a pipeline (embedded name, folder or hub id), and what replaces or adapts its UNet.

    fused_lora: folder or hub id of a LoRA that belongs to the base model: added to its weights, text encoders included.
    unet: folder of a UNet in the place of the pipeline's, in which that LoRA is already. lora: an adapter on top.
    distilled_lora, fp8_weights: for sampling only, see `ApproximateConfig`.
    """

    pipeline: str
    unet: str | None = None
    lora: str | None = None
    fused_lora: str | None = None
    distilled_lora: str | None = None
    fp8_weights: bool = False

    def digest(self) -> str:
        """Names the weights: digests of all folders involved."""
        parts = [
            source_digest(part) for part in (self.pipeline, self.fused_lora, self.unet, self.lora) if part is not None
        ]
        if self.distilled_lora is not None:
            parts.append(f"distilled.{source_digest(self.distilled_lora)}")
        return "-".join([*parts, "fp8"] if self.fp8_weights else parts)


@dataclass(frozen=True)
class PromptEmbeddings:
    """Rows of distinct prompts: context (n, tokens, width), pooled (n, width)."""

    context: Tensor
    pooled: Tensor

    def rows(self, indices: Sequence[int]) -> "PromptEmbeddings":
        """The rows of the given prompts, repeats allowed."""
        index = torch.tensor(list(indices))
        return PromptEmbeddings(self.context[index], self.pooled[index])


class SdxlModel:
    """A loaded SDXL pipeline on a device. Frozen: nothing here changes its weights."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, source: ModelSource, device: torch.device):
        self.pipeline = pipeline
        self.source = source
        self.device = device
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

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

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """Embeddings of prompts, on the CPU in the model's dtype; the empty one by `encode_unconditional`.

        Each prompt is encoded alone: in a batch its embedding would change, by rounding, with the batch's size. Each is
        encoded once, however many shards use it: the text encoders are never trained.
        """
        for text in texts:
            if text not in self._encoded:
                context, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt=text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
                self._encoded[text] = context.cpu(), pooled.cpu()
        found = [self._encoded[text] for text in texts]
        return PromptEmbeddings(
            torch.cat([context for context, _ in found]), torch.cat([pooled for _, pooled in found])
        )

    @torch.no_grad()
    def encode_unconditional(self) -> PromptEmbeddings:
        """What stands for "no prompt": zeros where the pipeline says so (as SDXL does), else the empty string's."""
        empty = self.encode_prompts([""])
        if self.pipeline.config.force_zeros_for_empty_prompt:
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


def load_sdxl(source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32") -> SdxlModel:
    """Loads a pipeline in safetensors, with the LoRAs and the UNet that the source names.

    Raises: ModelNotUsable with the reason and the way out.
    """
    resolved = resolve_source(source.pipeline)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    if Path(resolved).exists():
        check_pipeline_folder(Path(resolved))
    replacement = None
    if source.unet is not None:
        check_weights(Path(source.unet))
        replacement = UNet2DConditionModel.from_pretrained(source.unet, **options)
        # A LoRA is fused into the pipeline's own UNet, so that one has to be loaded first.
        if source.fused_lora is None:
            options["unet"] = replacement
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(resolved, add_watermarker=False, **options)
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{source.pipeline!r} could not be loaded as an SDXL pipeline: {error}. Give an embedded name, the path of "
            "a pipeline folder, or a hub id that this machine can reach or has in its cache."
        ) from error
    if source.fused_lora is not None:
        _fuse_lora(pipeline, source.fused_lora)
        if replacement is not None:
            pipeline.register_modules(unet=replacement)
    if source.distilled_lora is not None:
        _fuse_lora(pipeline, source.distilled_lora)
    if source.lora is not None:
        _load_lora(pipeline, source.lora)
    place = pick_device(device)
    pipeline.to(place)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.eval().requires_grad_(False)
    if source.fp8_weights:
        store_in_fp8(pipeline.unet, DTYPES[dtype])
    return SdxlModel(pipeline, source, place)


def _fuse_lora(pipeline: StableDiffusionXLPipeline, source: str) -> None:
    _load_lora(pipeline, source)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _load_lora(pipeline: StableDiffusionXLPipeline, source: str) -> None:
    try:
        pipeline.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as a LoRA: {str(error).splitlines()[0]} Give a folder with "
            f"{LORA_FILE}, or a hub id that this machine can reach or has in its cache."
        ) from error


def set_scheduler(model: SdxlModel, name: SchedulerName) -> None:
    """Replaces the pipeline's sampler, keeping its noise schedule."""
    model.pipeline.scheduler = SCHEDULERS[name].from_config(model.pipeline.scheduler.config)
