"""What may make sampling faster at the price of other images. Part of `popalign_core.config`, like every stage."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from popalign_core.stage_config import StageConfig


class ApproximateConfig(StageConfig):
    """What makes sampling faster and draws other images; as it stands here, nothing does: the sampler is exact."""

    steps: Annotated[
        int, Field(title="Fewer steps", ge=0, description="In the place of the exact sampler's; 0 = as many.")
    ] = 0
    distilled_lora: Annotated[
        str,
        Field(title="Distilled model", description="Folder or hub id of an LCM LoRA; drawn with the LCM scheduler."),
    ] = ""
    distilled_guidance: Annotated[
        float, Field(title="Guidance of the distilled model", ge=1, description="1 = none, as it was distilled for.")
    ] = 1.0
    fp8_weights: Annotated[
        bool,
        Field(title="FP8 weights", description="The UNet's weights are kept in 8 bits: half the memory, no speed."),
    ] = False
    cache_every: Annotated[
        PositiveInt,
        Field(title="Cache", description="The inner part of the UNet is computed each so many steps; 1 = each."),
    ] = 1

    @model_validator(mode="after")
    def _distilled(self) -> "ApproximateConfig":
        if self.distilled_lora and not self.steps:
            raise ValueError("a distilled model draws in few steps: set sampling.approximate.steps, 4 to 8 as a rule")
        if not self.distilled_lora and self.distilled_guidance != 1:
            raise ValueError("distilled_guidance goes with a distilled_lora, and there is none")
        return self

    @property
    def is_exact(self) -> bool:
        """Whether nothing here changes an image."""
        return self == ApproximateConfig()

    def named(self, exact_steps: int) -> tuple[str, ...]:
        """What is not exact, in words; none for the exact sampler."""
        found = {
            f"steps: {self.steps} instead of {exact_steps}": self.steps > 0,
            f"distilled by {self.distilled_lora}, guidance {self.distilled_guidance:g}": bool(self.distilled_lora),
            "UNet weights in FP8": self.fp8_weights,
            f"inner UNet computed every {self.cache_every} steps": self.cache_every > 1,
        }
        return tuple(words for words, used in found.items() if used)
