"""What a run does: one small frozen model a stage, and named presets. Drives the CLI, `prefect.yaml` and the form."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PositiveInt, ValidationError, model_validator

from popalign_core.approximations import ApproximateConfig, StageConfig
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput, UnknownName

AxisName = Literal["perceived_gender", "perceived_race", "perceived_skin_tone", "perceived_age", "perceived_couple"]
Share = Annotated[float, Field(ge=0, le=1)]


class ExpansionConfig(StageConfig):
    """Which prompts, and which attributes they are crossed with."""

    prompts: Annotated[
        tuple[str, ...],
        Field(
            title="Prompt sets",
            min_length=1,
            description="Built-in sets, or `split=path` of a text file, one subject a line.",
        ),
    ] = ("emoji-occupations", "emoji-activities")
    axes: Annotated[
        tuple[AxisName, ...], Field(title="Axes", min_length=1, description="Perceived attributes, crossed.")
    ] = ("perceived_gender", "perceived_skin_tone")
    prefix: Annotated[str, Field(title="Prefix", description="The same on both sides of every pair.")] = "a photo of "
    max_subjects: Annotated[
        int, Field(title="Subjects a split", ge=0, description="Only the first so many of each split; 0 = all.")
    ] = 0


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
    channels_last: Annotated[bool, Field(title="Channels last", description="Memory layout of UNet and VAE.")] = True
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
        int, Field(title="VAE batch", ge=0, description="Images decoded at once; 0 = the whole batch.")
    ] = 0
    encoding_threads: Annotated[
        PositiveInt, Field(title="Encoding threads", description="They compress images while the next are drawn.")
    ] = 2


class ImageCounts(StageConfig):
    """How many images are drawn for what. More images lower the sampling floor sqrt((1 - 1/K) / n)."""

    train_neutral: Annotated[PositiveInt, Field(title="Training, a neutral prompt")] = 20
    train_specific: Annotated[
        int, Field(title="Training, a group", ge=0, description="For drawn winners only; counterfactuals draw theirs.")
    ] = 2
    validation: Annotated[PositiveInt, Field(title="Validation, a prompt")] = 24
    evaluation: Annotated[PositiveInt, Field(title="Held out, a prompt")] = 48
    trained: Annotated[int, Field(title="Trained prompts again, a prompt", ge=0)] = 16
    obedience: Annotated[PositiveInt, Field(title="Identity-specific held out, a group and prompt")] = 2


class ClassificationConfig(StageConfig):
    """Who says which attribute is perceived. The judge of the assessment is another model than the builder's."""

    builder: Annotated[
        str, Field(title="Builder", description="open_clip model: embedded name, folder, or architecture@pretrained.")
    ] = "emoji-clip"
    judge: Annotated[
        str,
        Field(
            title="Judge",
            description="Independent classifiers: embedded name, folder with one an axis, or axis=hub id,axis=hub id.",
        ),
    ] = "emoji-heads"
    min_confidence: Annotated[Share, Field(title="Least confidence")] = 0.6
    max_unclassified: Annotated[
        Share,
        Field(title="Most unclassified", description="The run stops if the base model shows more unknowns than this."),
    ] = 0.5
    agreement: Annotated[
        bool,
        Field(
            title="Agreement",
            description="The builder labels held-out images too, and how far it agrees with the judge is reported.",
        ),
    ] = True

    @model_validator(mode="after")
    def _two_classifiers(self) -> "ClassificationConfig":
        if self.builder == self.judge:
            raise ValueError("builder and judge are the same model: preferences would be judged by their own maker")
        return self


class DetectionConfig(StageConfig):
    """Who is looked for in an image before it is classified; both empty = nobody, and images are classified whole."""

    persons: Annotated[
        str, Field(title="Persons", description="Object detector of transformers: folder or hub id; empty = off.")
    ] = ""
    faces: Annotated[
        str, Field(title="Faces", description="The same with a class `face`; then faces are classified, not persons.")
    ] = ""
    min_confidence: Annotated[Share, Field(title="Least confidence", description="Of a box that counts.")] = 0.5
    several: Annotated[
        Literal["largest", "all", "none"],
        Field(
            title="Several people",
            description="The image's label: the largest one's, one that all share, or none (status several).",
        ),
    ] = "largest"
    margin: Annotated[
        Share, Field(title="Margin", description="Around a box, on each side, as a share of its longer side.")
    ] = 0.25

    @property
    def on(self) -> bool:
        """Whether anybody is looked for."""
        return bool(self.persons or self.faces)


class PopulationsConfig(StageConfig):
    """How preferred populations are drawn."""

    winners: Annotated[
        Literal["drawn", "counterfactual"],
        Field(title="Winners", description="Drawn for every group; or own images again as another group."),
    ] = "drawn"
    size: Annotated[PositiveInt, Field(title="Population size", description="Of drawn winners.")] = 20
    weighting: Annotated[
        Literal["even", "contrast", "discrepancy", "axis"],
        Field(title="Pair weights", description="Whether pairs that move the population to its target count more."),
    ] = "contrast"
    overshoot: Annotated[
        float,
        Field(
            title="Overshoot",
            ge=0,
            description="Aim past the target by this many times the lean that validation prompts keep; 0 = at it.",
        ),
    ] = 0.0
    overshoot_axes: Annotated[
        tuple[AxisName, ...], Field(title="Overshooting axes", description="Where overshoot applies; none named = all.")
    ] = ()

    def overshoot_of(self, axis: str) -> float:
        """How many times the kept lean an axis is aimed past its target."""
        return self.overshoot if not self.overshoot_axes or axis in self.overshoot_axes else 0.0


class AlignmentConfig(StageConfig):
    """How the model is moved, in rounds that each end with a measurement on validation prompts."""

    objective: Annotated[
        Literal["popalign", "popalign_exact", "dpo", "sft", "reward"],
        Field(title="Objective", description="reward: a policy gradient on images that training draws itself."),
    ] = "popalign"
    rounds: Annotated[PositiveInt, Field(title="Rounds")] = 3
    redraw: Annotated[
        bool,
        Field(title="Redraw", description="Each round from the current model's own images; off: one long training."),
    ] = True
    steps: Annotated[PositiveInt, Field(title="Steps a round")] = 25
    pairs_per_step: Annotated[PositiveInt, Field(title="Pairs a step")] = 32
    learning_rate: Annotated[float, Field(title="Learning rate", gt=0)] = 4e-5
    learning_rate_schedule: Annotated[
        Literal["constant", "cosine"], Field(title="Schedule", description="Cosine: to 0 within every training.")
    ] = "constant"
    round_decay: Annotated[
        float, Field(title="Decay", gt=0, le=1, description="Learning rate of a round by that of the one before.")
    ] = 1.0
    beta: Annotated[
        float, Field(title="Beta", gt=0, description="On mean squared error a latent element; logged in natural units.")
    ] = 500.0
    anchor_weight: Annotated[float, Field(title="Anchor", ge=0, description="Weight of the winners' own error.")] = (
        100.0
    )
    preserve_weight: Annotated[
        float, Field(title="Preserve", ge=0, description="Weight of staying where the caption names the groups.")
    ] = 0.0
    first_timestep: Annotated[
        int, Field(title="First timestep", ge=0, description="Less noise than this is not trained on; 0 = all.")
    ] = 0
    caption_dropout: Annotated[
        Share, Field(title="Dropout", description="Share of pairs trained under the empty caption.")
    ] = 0.1
    caption_mixing: Annotated[
        float,
        Field(title="Mixing", ge=0, le=1, description="Each caption is moved up to this share of the way to another."),
    ] = 0.0
    trainable: Annotated[
        Literal["all", "conditioning"],
        Field(title="Trainable part", description="All of the UNet or transformer, or only where the caption enters."),
    ] = "all"
    lora_rank: Annotated[int, Field(title="LoRA rank", ge=0, description="0 = full fine-tuning.")] = 0
    winner_preserving: Annotated[
        bool, Field(title="Winner-preserving", description="Hold back pushes from a loser that would harm its winner.")
    ] = False
    ema_decay: Annotated[
        float | None,
        Field(title="Average", ge=0, lt=1, description="Keep a moving average of the weights with this decay."),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(title="Gradient checkpointing", description="Computes activations twice instead of keeping them.")
    ] = False
    micro_batch: Annotated[
        int,
        Field(
            title="Micro-batch",
            ge=0,
            description="Pairs in a pass; the gradient is that of the whole step. 0 = all of a process's at once.",
        ),
    ] = 0
    mixed_precision: Annotated[
        bool,
        Field(title="Mixed precision", description="Passes in bfloat16; trained weights and optimizer in float32."),
    ] = False
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit"],
        Field(title="Optimizer", description="8 bit: moments in a quarter of the memory; needs the extra eight-bit."),
    ] = "adamw"
    compiled: Annotated[
        bool, Field(title="Compiled", description="The UNet's repeated blocks through torch.compile; minutes at first.")
    ] = False
    spike_limit: Annotated[
        float | None,
        Field(title="Spike", gt=0, description="Stop at a loss this many robust deviations above the last 50."),
    ] = None
    max_quality_drop: Annotated[
        float | None,
        Field(
            title="Most quality lost",
            ge=0,
            le=1,
            description="Share of the CLIP score on validation prompts that a model may lose and be kept; none = any.",
        ),
    ] = None
    seeds: Annotated[
        PositiveInt,
        Field(title="Training seeds", description="The kept round again with other seeds, all measured held out."),
    ] = 1
    checkpoint_steps: Annotated[
        PositiveInt, Field(title="Steps to a checkpoint", description="What a crash in the middle of a round can cost.")
    ] = 50


class RewardConfig(StageConfig):
    """What the objective `reward` draws and trains on; its chain has the sampler's steps and guidance."""

    group_size: Annotated[
        int, Field(title="Group", ge=2, description="Images of a prompt that are drawn and judged together.")
    ] = 12
    groups: Annotated[PositiveInt, Field(title="Groups a step", description="Prompts that are drawn for a step.")] = 6
    trained_steps: Annotated[
        PositiveInt, Field(title="Trained steps", description="Denoising steps of an image that are differentiated.")
    ] = 3
    kl_weight: Annotated[
        float, Field(title="KL", ge=0, description="Weight of the divergence from the reference in a denoising step.")
    ] = 0.0


class AssessmentConfig(StageConfig):
    """When a model is promoted."""

    min_reduction: Annotated[
        Share, Field(title="Least reduction", description="Share by which every axis must fall.")
    ] = 0.5
    max_obedience_drop: Annotated[Share, Field(title="Most obedience lost")] = 0.02
    max_score_drop: Annotated[Share, Field(title="Most CLIP score lost", description="Relative.")] = 0.02
    max_unknown_rise: Annotated[Share, Field(title="Most unknowns gained")] = 0.05
    resamples: Annotated[int, Field(title="Bootstrap resamples", ge=200)] = 2000


class RunConfig(StageConfig):
    """A whole run: the model, the seed and a part for every stage."""

    model: Annotated[str, Field(title="Model", description="Embedded name, pipeline folder or hub id.")] = "emoji"
    model_lora: Annotated[
        str,
        Field(title="LoRA of the model", description="Folder or hub id of a LoRA that the base model is used with."),
    ] = ""
    model_unet: Annotated[
        str,
        Field(
            title="UNet of the model",
            description="Folder of a UNet or transformer in the place of the base model's, its LoRA already in it.",
        ),
    ] = ""
    seed: Annotated[int, Field(title="Seed", ge=0)] = 0
    device: Annotated[str, Field(title="Device", description="auto, cpu, cuda, cuda:1 ...")] = "auto"
    expansion: Annotated[ExpansionConfig, Field(title="Expansion")] = ExpansionConfig()
    sampling: Annotated[SamplingConfig, Field(title="Sampling")] = SamplingConfig()
    acceleration: Annotated[AccelerationConfig, Field(title="Acceleration of sampling")] = AccelerationConfig()
    images: Annotated[ImageCounts, Field(title="Images")] = ImageCounts()
    classification: Annotated[ClassificationConfig, Field(title="Classification")] = ClassificationConfig()
    detection: Annotated[DetectionConfig, Field(title="Detection")] = DetectionConfig()
    populations: Annotated[PopulationsConfig, Field(title="Populations")] = PopulationsConfig()
    alignment: Annotated[AlignmentConfig, Field(title="Alignment")] = AlignmentConfig()
    reward: Annotated[RewardConfig, Field(title="Reward")] = RewardConfig()
    assessment: Annotated[AssessmentConfig, Field(title="Assessment")] = AssessmentConfig()

    @model_validator(mode="after")
    def _images_for_winners(self) -> "RunConfig":
        if self.populations.winners == "drawn" and self.images.train_specific == 0:
            raise ValueError("populations.winners is drawn and images.train_specific is 0: there would be no winner")
        if self.populations.winners == "counterfactual" and self.images.train_specific:
            raise ValueError("counterfactual winners are drawn one by one: set images.train_specific to 0")
        return self

    @model_validator(mode="after")
    def _weights_to_fuse(self) -> "RunConfig":
        if self.acceleration.fused_projections and self.alignment.lora_rank:
            raise ValueError(
                "acceleration.fused_projections leaves out a LoRA beside the weights: turn one of them off"
            )
        return self


def with_settings(config: RunConfig, settings: dict[str, str]) -> RunConfig:
    """A copy with dotted keys replaced ("sampling.steps" -> "20"), everything checked again. Raises: InvalidInput."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for key, value in settings.items():
        *parts, name = key.split(".")
        target: dict[str, Any] | None = values
        for part in parts:
            target = _part(target, part)
        if target is None or name not in target or _part(target, name) is not None:
            raise UnknownName(kind="setting", got=key, known=_setting_names(values))
        target[name] = [part.strip() for part in value.split(",")] if isinstance(target[name], list) else value
    return parse_config(values)


def _part(values: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """A stage, or a part of one; None if there is none of that name."""
    found = (values or {}).get(name)
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None


def _setting_names(values: dict[str, Any]) -> list[str]:
    """Dotted, those of the stages first."""
    nested = [f"{name}.{inner}" for name in values for inner in _setting_names(_part(values, name) or {})]
    return [*nested, *(name for name in values if _part(values, name) is None)]


def parse_config(values: object) -> RunConfig:
    """A configuration from plain values. Raises: InvalidInput with one line a fault."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']} (got {fault['input']!r})" for fault in error.errors()
        ]
        axes = f" Axes are {', '.join(AXES)}." if any("axes" in fault for fault in faults) else ""
        raise InvalidInput("the configuration is not usable: " + "; ".join(faults) + "." + axes) from error
