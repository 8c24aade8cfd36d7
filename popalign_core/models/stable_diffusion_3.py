"""Stable Diffusion 3: two or three text encoders, a transformer that predicts the velocity of a rectified flow."""

from torch import Tensor

from popalign_core.alignment.denoiser import FlowSchedule
from popalign_core.models.denoisers import FlowDenoiser, flow_schedule_of
from popalign_core.models.families import STABLE_DIFFUSION_3
from popalign_core.models.sdxl import DtypeName, ModelSource, PipelineModel, load_pipeline, pick_device


class StableDiffusion3Model(PipelineModel):
    """See `PipelineModel`. The padding of captions is part of the context, unmasked, as in the pipeline."""

    family = STABLE_DIFFUSION_3

    def encode_prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """See `PipelineModel`. Tokens of both CLIP encoders, then those of T5, or zeros without it."""
        context, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=text,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return context, pooled

    def schedule(self, image_size: int = 0) -> FlowSchedule:
        """See `PipelineModel`."""
        patch = self.pixels_per_latent * int(self.network.config.patch_size)
        return flow_schedule_of(self.pipeline.scheduler, ((image_size or self.native_size) // patch) ** 2)

    def denoiser(self, image_size: int = 0) -> FlowDenoiser:
        """See `PipelineModel`."""
        return FlowDenoiser(self.network, self.schedule(image_size))


def load_stable_diffusion_3(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32"
) -> StableDiffusion3Model:
    """As `load_pipeline`."""
    place = pick_device(device)
    return StableDiffusion3Model(load_pipeline(source, STABLE_DIFFUSION_3, device=place, dtype=dtype), source, place)
