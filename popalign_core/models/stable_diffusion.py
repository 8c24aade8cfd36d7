"""Stable Diffusion 1 and 2: one text encoder, nothing pooled, a UNet that predicts noise or velocity."""

from typing import Any

from torch import Tensor

from popalign_core.acceleration import VaeDtype
from popalign_core.models.denoisers import UnetDenoiser
from popalign_core.models.families import STABLE_DIFFUSION
from popalign_core.models.sdxl import DtypeName, ModelSource, PipelineModel, load_pipeline, pick_device


class StableDiffusionModel(PipelineModel):
    """See `PipelineModel`."""

    family = STABLE_DIFFUSION

    def denoiser(self, image_size: int = 0) -> UnetDenoiser:  # noqa: ARG002 - it is told no size
        """See `PipelineModel`."""
        return UnetDenoiser(self.network, self.schedule())

    def conditions(self, context: Tensor, pooled: Tensor, height: int, width: int) -> dict[str, Any]:  # noqa: ARG002
        """See `PipelineModel`. The caption's tokens alone."""
        return {"encoder_hidden_states": context}


def load_stable_diffusion(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32", vae_dtype: VaeDtype = "model"
) -> StableDiffusionModel:
    """As `load_pipeline`, without the safety checker: its black images would be counted as unknown."""
    place = pick_device(device)
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = load_pipeline(source, STABLE_DIFFUSION, place, dtype, vae_dtype, **without)
    return StableDiffusionModel(pipeline, source, place)
