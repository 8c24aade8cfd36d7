"""How images are drawn, and what makes that faster. Parts of `popalign_core.config`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from popalign_core.acceleration import Layout
from popalign_core.approximations import ApproximateConfig
from popalign_core.stage_config import StageConfig


class SamplingConfig(StageConfig):
    """How images are drawn. All but shard size and kept latents is part of the sampler's fingerprint."""

    scheduler: Annotated[
        Literal["ddim", "euler", "dpm++", "flow-euler"],
        Field(title="Scheduler", description="flow-euler for models of flow matching (SD3), the others for the rest."),
    ] = "ddim"
    steps: Annotated[PositiveInt, Field(title="Steps")] = 30
    guidance_scale: Annotated[float, Field(title="Guidance", ge=1, description="1 = none.")] = 5.0
    image_size: Annotated[
        int, Field(title="Image side", ge=0, description="Pixels; 0 = the size the model was trained at.")
    ] = 0
    batch_size: Annotated[PositiveInt, Field(title="Batch", description="Images in one fixed batch shape.")] = 8
    shard_size: Annotated[
        PositiveInt, Field(title="Shard", description="Images in one committed shard: what a crash can cost.")
    ] = 256
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Field(title="Number format")] = "float32"
    attention: Annotated[Literal["default", "cudnn", "flash", "efficient", "math"], Field(title="Attention kernel")] = (
        "default"
    )
    keep_latents: Annotated[
        bool,
        Field(title="Keep latents", description="Beside the images; training then takes them and encodes no image."),
    ] = False
    approximate: Annotated[
        ApproximateConfig, Field(title="Approximate", description="Faster, but other images: measure what that does.")
    ] = ApproximateConfig()

    @model_validator(mode="after")
    def _fewer_steps(self) -> "SamplingConfig":
        if self.approximate.steps >= self.steps:
            raise ValueError(f"approximate.steps is {self.approximate.steps}, not fewer than the {self.steps} of steps")
        return self

    @property
    def drawn_steps(self) -> int:
        """Steps that are taken."""
        return self.approximate.steps or self.steps

    @property
    def drawn_guidance(self) -> float:
        """Guidance that is used; 1 = none."""
        return self.approximate.distilled_guidance if self.approximate.distilled_lora else self.guidance_scale

    @property
    def drawn_scheduler(self) -> Literal["ddim", "euler", "dpm++", "flow-euler", "lcm"]:
        """Scheduler that is used: a distilled model brings its own."""
        return "lcm" if self.approximate.distilled_lora else self.scheduler

    @property
    def approximations(self) -> tuple[str, ...]:
        """What is not exact, in words; none for the exact sampler."""
        return self.approximate.named(self.steps)


class AccelerationConfig(StageConfig):
    """What makes sampling faster and keeps the images, up to rounding. All but threads is in the fingerprint."""

    skip_empty_attention: Annotated[
        bool, Field(title="Skip empty attention", description="No cross-attention where an all-zero prompt stands.")
    ] = True
    channels_last: Annotated[
        Layout, Field(title="Channels last", description="Memory layout of UNet and VAE; auto = on a GPU.")
    ] = "auto"
    compile: Annotated[
        Literal["none", "regional", "full"],
        Field(title="Compile", description="Each transformer block, or the whole UNet; minutes at the start."),
    ] = "none"
    fused_projections: Annotated[
        bool, Field(title="Fused projections", description="Query, key and value in one product; not with a LoRA.")
    ] = False
    cuda_graphs: Annotated[
        bool, Field(title="CUDA graphs", description="Starts all kernels of the UNet at once: for small batches.")
    ] = False
    vae_dtype: Annotated[
        Literal["model", "float32", "bfloat16"],
        Field(title="VAE's number format", description="model: the sampler's, or float32 if that would overflow."),
    ] = "model"
    vae_batch: Annotated[
        int,
        Field(
            title="VAE batch",
            ge=0,
            description="Images decoded at once; 0 = auto: all of a batch, on a GPU 2 of 512 pixels and more.",
        ),
    ] = 0
    encoding_threads: Annotated[
        PositiveInt, Field(title="Encoding threads", description="They compress images while the next are drawn.")
    ] = 2

    @field_validator("channels_last", mode="before")
    @classmethod
    def _written_before(cls, value: object) -> object:
        """Runs of before it had three values have true or false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
