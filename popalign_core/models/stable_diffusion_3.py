"""Stable Diffusion 3: two or three text encoders, a transformer that predicts the velocity of a rectified flow."""

from typing import Any

from torch import Tensor

from popalign_core.acceleration import VaeDtype
from popalign_core.alignment.denoiser import FlowSchedule
from popalign_core.models.denoisers import FlowDenoiser, flow_schedule_of, resolution_shift
from popalign_core.models.families import STABLE_DIFFUSION_3
from popalign_core.models.sdxl import DtypeName, ModelSource, PipelineModel, load_pipeline, pick_device


class StableDiffusion3Model(PipelineModel):
    """See `PipelineModel`. The padding of captions is part of the context, unmasked, as in the pipeline."""

    family = STABLE_DIFFUSION_3

    def schedule(self, image_size: int = 0) -> FlowSchedule:
        """See `PipelineModel`."""
        side = image_size or self.native_size
        return flow_schedule_of(self.pipeline.scheduler, self.patches(side, side))

    def denoiser(self, image_size: int = 0) -> FlowDenoiser:
        """See `PipelineModel`."""
        return FlowDenoiser(self.network, self.schedule(image_size))

    def conditions(self, context: Tensor, pooled: Tensor, height: int, width: int) -> dict[str, Any]:  # noqa: ARG002
        """See `PipelineModel`."""
        return {"encoder_hidden_states": context, "pooled_projections": pooled}

    def shift(self, height: int, width: int) -> dict[str, float]:
        """See `PipelineModel`. `mu`, where the scheduler shifts with the resolution."""
        config = self.pipeline.scheduler.config
        return {"mu": resolution_shift(config, self.patches(height, width))} if config.use_dynamic_shifting else {}

    def patches(self, height: int, width: int) -> int:
        """Tokens of an image. height, width in pixels."""
        side = self.pixels_per_latent * int(self.network.config.patch_size)
        return (height // side) * (width // side)


def load_stable_diffusion_3(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32", vae_dtype: VaeDtype = "model"
) -> StableDiffusion3Model:
    """As `load_pipeline`."""
    place = pick_device(device)
    pipeline = load_pipeline(source, STABLE_DIFFUSION_3, place, dtype, vae_dtype)
    return StableDiffusion3Model(pipeline, source, place)
