"""What a run does: one small frozen model a stage, and named presets. Drives the CLI, `prefect.yaml` and the form."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, PositiveInt, ValidationError, model_validator

from popalign_core.alignment_config import AlignmentConfig as AlignmentConfig
from popalign_core.alignment_config import RewardConfig as RewardConfig
from popalign_core.assessment_config import AssessmentConfig as AssessmentConfig
from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.quality_config import QualityConfig as QualityConfig
from popalign_core.sampling_config import AccelerationConfig as AccelerationConfig
from popalign_core.sampling_config import SamplingConfig as SamplingConfig
from popalign_core.stage_config import AxisName, Share, StageConfig


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
    controls: Annotated[
        tuple[str, ...],
        Field(
            title="Controls",
            description="Prompts that must not change: people-and-things, or text files, a subject a line, "
            "`| axis=group` after it where that is a fact; without, nobody is depicted.",
        ),
    ] = ()
    prefix: Annotated[str, Field(title="Prefix", description="The same on both sides of every pair.")] = "a photo of "
    max_subjects: Annotated[
        int, Field(title="Subjects a split", ge=0, description="Only the first so many of each split; 0 = all.")
    ] = 0


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
    controls: Annotated[PositiveInt, Field(title="Controls, a prompt")] = 10


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
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(
            title="Number format",
            description="Of both classifiers. bfloat16 is faster and moves labels near a border; it is in their names.",
        ),
    ] = "float32"

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
    quality: Annotated[QualityConfig, Field(title="Quality")] = QualityConfig()
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

    @model_validator(mode="after")
    def _one_way_of_computing(self) -> "RunConfig":
        approximate, acceleration = self.sampling.approximate, self.acceleration
        of_the_unet = {
            "acceleration.compile=full": acceleration.compile == "full",
            "acceleration.cuda_graphs=true": acceleration.cuda_graphs,
        }
        of_layers = {
            "acceleration.compile=regional": acceleration.compile == "regional",
            "acceleration.fused_projections=true": acceleration.fused_projections,
        }
        if approximate.cache_every > 1 and (found := _turned_on(of_the_unet)):
            raise ValueError(
                f"sampling.approximate.cache_every leaves parts of the UNet out of some steps, and {found} "
                "would go on repeating the first step's: turn one of them off"
            )
        if approximate.fp8_weights and (found := _turned_on(of_the_unet | of_layers)):
            raise ValueError(
                "sampling.approximate.fp8_weights widens each layer's weights as it is called, which "
                f"{found} would fix at the first call: turn one of them off"
            )
        return self

    @model_validator(mode="after")
    def _formats_of_training(self) -> "RunConfig":
        if self.alignment.lora_rank and self.sampling.dtype == "float16":
            raise ValueError(
                "sampling.dtype is float16, in which a LoRA beside it would be trained, and its small gradients become "
                "0 there: set sampling.dtype to bfloat16 or float32, or alignment.lora_rank to 0"
            )
        return self


def _turned_on(switches: dict[str, bool]) -> str:
    return " and ".join(sorted(name for name, on in switches.items() if on))


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
