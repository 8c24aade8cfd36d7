"""Stable Diffusion 1 and 2: one text encoder, nothing pooled, a UNet that predicts noise or velocity."""

from torch import Tensor

from popalign_core.models.denoisers import UnetDenoiser
from popalign_core.models.families import STABLE_DIFFUSION
from popalign_core.models.sdxl import DtypeName, ModelSource, PipelineModel, load_pipeline, pick_device


class StableDiffusionModel(PipelineModel):
    """See `PipelineModel`."""

    family = STABLE_DIFFUSION

    def encode_prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """See `PipelineModel`."""
        context: Tensor = self.pipeline.encode_prompt(
            prompt=text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return context, context.new_zeros(1, 0)

    def denoiser(self, image_size: int = 0) -> UnetDenoiser:  # noqa: ARG002 - it is told no size
        """See `PipelineModel`."""
        return UnetDenoiser(self.network, self.schedule())


def load_stable_diffusion(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32"
) -> StableDiffusionModel:
    """As `load_pipeline`, without the safety checker: its black images would be counted as unknown."""
    place = pick_device(device)
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = load_pipeline(source, STABLE_DIFFUSION, device=place, dtype=dtype, **without)
    return StableDiffusionModel(pipeline, source, place)
