"""Pipelines of diffusers, whatever the family, and SDXL: one loader for embedded, local and hub models."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from popalign_core.acceleration import VaeDtype
from popalign_core.alignment.denoiser import Schedule
from popalign_core.devices import device_name
from popalign_core.errors import InvalidInput, ModelNotUsable
from popalign_core.models.approximate import store_in_fp8
from popalign_core.models.checkpoints import (
    absent_parts,
    check_image_size,
    check_pipeline_folder,
    check_weights,
    read_config,
    resolve_source,
    source_digest,
)
from popalign_core.models.denoisers import SdxlDenoiser, noise_schedule_of
from popalign_core.models.families import SDXL, Family, check_prediction, largest_side, size_step
from popalign_core.models.latent_scaling import scaled_moments
from popalign_core.models.lora import FILE_NAME as LORA_FILE
from popalign_core.models.prompt_embeddings import PromptEmbeddings, PromptEncoder

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "flow-euler": FlowMatchEulerDiscreteScheduler,
    "lcm": LCMScheduler,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SchedulerName = Literal["ddim", "euler", "dpm++", "flow-euler", "lcm"]
DtypeName = Literal["float32", "bfloat16", "float16"]
_WAY_OUT = (
    "Give an embedded name, the path of a pipeline folder, or a hub id that this machine can reach or has in its cache."
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a pipeline (embedded name, folder or hub id), and what replaces or adapts its denoiser.

    fused_lora: folder or hub id of a LoRA that belongs to the base model: added to its weights, text encoders included.
    unet: folder of a UNet or transformer in the place of the pipeline's, in which that LoRA is already. lora: an
    adapter on top.
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


class PipelineModel:
    """A loaded pipeline on a device; its families differ in little. Frozen: nothing here changes its weights."""

    family: Family

    def __init__(self, pipeline: DiffusionPipeline, source: ModelSource, device: torch.device):
        self.pipeline = pipeline
        self.source = source
        self.device = device
        surroundings = {name: version(name) for name in ("torch", "transformers", "diffusers")}
        self.prompts = PromptEncoder(pipeline, device, surroundings | {"device": device_name(device)})

    def encode_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """Embeddings of at least one prompt, on the CPU in the model's dtype, each encoded once."""
        return self.prompts.encode(texts)

    @property
    def pixels_per_latent(self) -> int:
        """Image pixels per latent position along each side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def network(self) -> Any:
        """The part that predicts, and that is trained."""
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def native_size(self) -> int:
        """Image side in pixels at which the denoiser was trained."""
        return int(self.network.config.sample_size) * self.pixels_per_latent

    def check_size(self, height: int, width: int) -> None:
        """Raises: InvalidInput where the size does not fit the latent grid and the denoiser's levels."""
        vae, denoiser = dict(self.pipeline.vae.config), dict(self.network.config)
        check_image_size(height, width, size_step(self.family, denoiser, vae), largest_side(denoiser, vae))

    def schedule(self, image_size: int = 0) -> Schedule:  # noqa: ARG002 - some families shift it with the size
        """The forward process that the pipeline was trained on. image_size: pixels a side, 0 = the model's own."""
        return noise_schedule_of(self.pipeline.scheduler)

    def denoiser(self, image_size: int = 0) -> nn.Module:
        """The network as training calls it, a `TrainableDenoiser`. image_size: as in `schedule`."""
        raise NotImplementedError

    def conditions(self, context: Tensor, pooled: Tensor, height: int, width: int) -> dict[str, Any]:
        """What the network is called with beside latents and time, rows as given. height, width in pixels."""
        raise NotImplementedError

    def shift(self, height: int, width: int) -> dict[str, float]:  # noqa: ARG002 - some families shift with the size
        """What a sampler's times are set with beside their number. height, width in pixels."""
        return {}

    @property
    def has_zero_unconditional(self) -> bool:
        """Whether zeros stand for "no prompt", as in SDXL."""
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))

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

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latent moments of images: mean and deviation, each (n, c, h, w), on the CPU in float32.

        pixels: float (n, 3, h, w) in [-1, 1].
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        mean, deviation = scaled_moments(posterior.mean, posterior.std, vae.config)
        return mean.float().cpu(), deviation.float().cpu()


class SdxlModel(PipelineModel):
    """Stable Diffusion XL: two text encoders, the second one's pooled output, and size conditions."""

    family = SDXL

    def denoiser(self, image_size: int = 0) -> SdxlDenoiser:
        """See `PipelineModel`."""
        side = image_size or self.native_size
        return SdxlDenoiser(self.network, self.schedule(), self.time_ids(side, side))

    def conditions(self, context: Tensor, pooled: Tensor, height: int, width: int) -> dict[str, Any]:
        """See `PipelineModel`."""
        times = self.time_ids(height, width).to(pooled.device, pooled.dtype).repeat(len(pooled), 1)
        added = {"text_embeds": pooled, "time_ids": times}
        return {"encoder_hidden_states": context, "added_cond_kwargs": added}

    def time_ids(self, height: int, width: int) -> Tensor:
        """SDXL's size conditions (1, 6): original size, crop corner, target size."""
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


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
    """As `load_pipeline`, for what is known to be SDXL."""
    place = pick_device(device)
    pipeline = load_pipeline(source, SDXL, place, dtype, vae_dtype, add_watermarker=False)
    return SdxlModel(pipeline, source, place)


def pipeline_index(pipeline: str) -> dict[str, Any]:
    """The `model_index.json` of an embedded name, a folder or a hub id. Raises: ModelNotUsable."""
    resolved = resolve_source(pipeline)
    if Path(resolved).exists():
        return read_config(Path(resolved) / "model_index.json")
    try:
        return cast("dict[str, Any]", DiffusionPipeline.load_config(resolved))
    except (OSError, ValueError) as error:
        raise ModelNotUsable(f"{pipeline!r} could not be loaded: {error}. {_WAY_OUT}") from error


def load_pipeline(
    source: ModelSource,
    family: Family,
    device: torch.device,
    dtype: DtypeName = "float32",
    vae_dtype: VaeDtype = "model",
    **options: Any,
) -> DiffusionPipeline:
    """Loads a pipeline in safetensors, with the LoRAs and the UNet or transformer that the source names.

    vae_dtype: model = like the rest; where that is float16 and the VAE overflows in it, float32. options: of the
    pipeline's constructor. Raises: ModelNotUsable with the reason and the way out.
    """
    replacement = None
    if source.unet is not None:
        check_weights(Path(source.unet))
        network = getattr(diffusers, family.network)
        replacement = network.from_pretrained(source.unet, dtype=DTYPES[dtype], use_safetensors=True)
        # A LoRA is fused into the pipeline's own denoiser, so that one has to be loaded first.
        if source.fused_lora is None:
            options[family.denoiser] = replacement
    options["dtype"] = DTYPES[dtype]
    if vae_dtype not in ("model", dtype):
        options["dtype"] = {"vae": DTYPES[vae_dtype], "default": DTYPES[dtype]}
    pipeline = _opened(source.pipeline, family, options)
    check_prediction(family, {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config})
    if source.fused_lora is not None:
        _fuse_lora(pipeline, source.fused_lora)
        if replacement is not None:
            pipeline.register_modules(**{family.denoiser: replacement})
    if source.distilled_lora is not None:
        _fuse_lora(pipeline, source.distilled_lora)
    if source.lora is not None:
        _load_lora(pipeline, source.lora)
    if vae_dtype == "model" and dtype == "float16" and pipeline.vae.config.force_upcast:
        torch.nn.Module.to(pipeline.vae, torch.float32)  # as diffusers does for each decoding
    # The text encoders stay in main memory: see PromptEncoder.
    for part in (getattr(pipeline, family.denoiser), pipeline.vae):
        part.to(device)  # the sampler gives them their memory layout
    pipeline.set_progress_bar_config(disable=True)
    for part in family.weighted:
        if (network := getattr(pipeline, part)) is not None:
            network.eval().requires_grad_(False)
    if source.fp8_weights:
        store_in_fp8(getattr(pipeline, family.denoiser), DTYPES[dtype])
    return pipeline


def _opened(source: str, family: Family, options: dict[str, Any]) -> DiffusionPipeline:
    resolved = resolve_source(source)
    if Path(resolved).exists():
        check_pipeline_folder(Path(resolved))
    # diffusers wants to be told of a part that is not there.
    absent: dict[str, None] = dict.fromkeys(absent_parts(family, pipeline_index(source))) if family.optional else {}
    try:
        return getattr(diffusers, family.pipeline).from_pretrained(resolved, use_safetensors=True, **absent, **options)
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as a pipeline of {family.title}: {error}. {_WAY_OUT}"
        ) from error


def _fuse_lora(pipeline: DiffusionPipeline, source: str) -> None:
    _load_lora(pipeline, source)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()


def _load_lora(pipeline: DiffusionPipeline, source: str) -> None:
    try:
        pipeline.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as a LoRA: {str(error).splitlines()[0]} Give a folder with "
            f"{LORA_FILE}, or a hub id that this machine can reach or has in its cache."
        ) from error
