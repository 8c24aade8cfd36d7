"""Pipelines of diffusers, whatever the family, and SDXL: one loader for embedded, local and hub models."""

from collections.abc import Sequence
from dataclasses import dataclass
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
)
from safetensors import SafetensorError
from torch import Tensor, nn

from popalign_core.alignment.denoiser import Schedule
from popalign_core.errors import InvalidInput, ModelNotUsable
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
from popalign_core.models.lora import FILE_NAME as LORA_FILE
from popalign_core.models.text_to_image import TextToImageModel

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "flow-euler": FlowMatchEulerDiscreteScheduler,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SchedulerName = Literal["ddim", "euler", "dpm++", "flow-euler"]
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


@dataclass(frozen=True)
class PromptEmbeddings:
    """Rows of distinct prompts: context (n, tokens, width), pooled (n, width), of width 0 where a model takes none."""

    context: Tensor
    pooled: Tensor

    def rows(self, indices: Sequence[int]) -> "PromptEmbeddings":
        """The rows of the given prompts, repeats allowed."""
        index = torch.tensor(list(indices))
        return PromptEmbeddings(self.context[index], self.pooled[index])


class PipelineModel:
    """A loaded pipeline on a device; its families differ in little. Frozen: nothing here changes its weights."""

    family: Family

    def __init__(self, pipeline: DiffusionPipeline, source: ModelSource, device: torch.device):
        self.pipeline = pipeline
        self.source = source
        self.device = device
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

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

    def encode_prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """Context (1, tokens, width) and pooled (1, width) of one prompt, on the device."""
        raise NotImplementedError

    def schedule(self, image_size: int = 0) -> Schedule:  # noqa: ARG002 - some families shift it with the size
        """The forward process that the pipeline was trained on. image_size: pixels a side, 0 = the model's own."""
        return noise_schedule_of(self.pipeline.scheduler)

    def denoiser(self, image_size: int = 0) -> nn.Module:
        """The network as training calls it, a `TrainableDenoiser`. image_size: as in `schedule`."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_prompts(self, texts: Sequence[str]) -> PromptEmbeddings:
        """Embeddings of prompts, on the CPU in the model's dtype; the empty one by `encode_unconditional`.

        Each prompt is encoded alone: in a batch its embedding would change, by rounding, with the batch's size. Each is
        encoded once, however many shards use it: the text encoders are never trained.
        """
        for text in texts:
            if text not in self._encoded:
                context, pooled = self.encode_prompt(text)
                self._encoded[text] = context.cpu(), pooled.cpu()
        found = [self._encoded[text] for text in texts]
        return PromptEmbeddings(
            torch.cat([context for context, _ in found]), torch.cat([pooled for _, pooled in found])
        )

    @torch.no_grad()
    def encode_unconditional(self) -> PromptEmbeddings:
        """What stands for "no prompt": zeros where the pipeline says so (as SDXL does), else the empty string's."""
        empty = self.encode_prompts([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt", False):
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

    def conditions(self, rows: PromptEmbeddings, empty: PromptEmbeddings | None) -> dict[str, Tensor]:
        """What the pipeline is called with for a batch of prompts, on the device. empty: None without guidance."""
        count = len(rows.context)
        given = {"prompt_embeds": rows.context, "pooled_prompt_embeds": rows.pooled}
        if empty is not None:
            given["negative_prompt_embeds"] = empty.context.expand(count, -1, -1)
            given["negative_pooled_prompt_embeds"] = empty.pooled.expand(count, -1)
        return {name: tensor.to(self.device) for name, tensor in given.items() if tensor.shape[-1]}

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled latent moments of images: mean and deviation, each (n, c, h, w), on the CPU in float32.

        pixels: float (n, 3, h, w) in [-1, 1].
        """
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        factor, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        return ((posterior.mean - shift) * factor).float().cpu(), (posterior.std * factor).float().cpu()


class SdxlModel(PipelineModel):
    """Stable Diffusion XL: two text encoders, the second one's pooled output, and size conditions."""

    family = SDXL

    def encode_prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """See `PipelineModel`."""
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return context, pooled

    def denoiser(self, image_size: int = 0) -> SdxlDenoiser:
        """See `PipelineModel`."""
        side = image_size or self.native_size
        return SdxlDenoiser(self.network, self.schedule(), self.time_ids(side, side))

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


def load_sdxl(source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32") -> SdxlModel:
    """As `load_pipeline`, for what is known to be SDXL."""
    place = pick_device(device)
    return SdxlModel(load_pipeline(source, SDXL, device=place, dtype=dtype, add_watermarker=False), source, place)


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
    source: ModelSource, family: Family, *, device: torch.device, dtype: DtypeName, **options: Any
) -> DiffusionPipeline:
    """Loads a pipeline in safetensors, with the LoRAs and the UNet or transformer that the source names.

    options: of the pipeline's constructor. Raises: ModelNotUsable with the reason and the way out.
    """
    resolved = resolve_source(source.pipeline)
    loading: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True}
    if Path(resolved).exists():
        check_pipeline_folder(Path(resolved))
    # diffusers wants to be told of a part that is not there.
    options.update(dict.fromkeys(absent_parts(family, pipeline_index(source.pipeline))))
    replacement = None
    if source.unet is not None:
        check_weights(Path(source.unet))
        replacement = getattr(diffusers, family.network).from_pretrained(source.unet, **loading)
        # A LoRA is fused into the pipeline's own denoiser, so that one has to be loaded first.
        if source.fused_lora is None:
            options[family.denoiser] = replacement
    try:
        pipeline = getattr(diffusers, family.pipeline).from_pretrained(resolved, **loading, **options)
    except (OSError, ValueError) as error:
        raise ModelNotUsable(
            f"{source.pipeline!r} could not be loaded as a pipeline of {family.title}: {error}. {_WAY_OUT}"
        ) from error
    check_prediction(family, {"_class_name": type(pipeline.scheduler).__name__, **pipeline.scheduler.config})
    if source.fused_lora is not None:
        _load_lora(pipeline, source.fused_lora)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        if replacement is not None:
            pipeline.register_modules(**{family.denoiser: replacement})
    if source.lora is not None:
        _load_lora(pipeline, source.lora)
    pipeline.to(device)
    getattr(pipeline, family.denoiser).to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    for part in family.weighted:
        if (network := getattr(pipeline, part)) is not None:
            network.eval().requires_grad_(False)
    return pipeline


def _load_lora(pipeline: DiffusionPipeline, source: str) -> None:
    try:
        pipeline.load_lora_weights(source, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelNotUsable(
            f"{source!r} could not be loaded as a LoRA: {str(error).splitlines()[0]} Give a folder with "
            f"{LORA_FILE}, or a hub id that this machine can reach or has in its cache."
        ) from error


def set_scheduler(model: TextToImageModel, name: SchedulerName) -> None:
    """Replaces the pipeline's sampler, keeping its noise schedule. Raises: UnknownName where it does not fit."""
    model.family.check_scheduler(name)
    model.pipeline.scheduler = SCHEDULERS[name].from_config(model.pipeline.scheduler.config)
