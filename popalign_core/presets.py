"""Named configurations: the embedded model, SDXL, and the sizes of the paper's code."""

from collections.abc import Sequence
from typing import Literal

from popalign_core.config import (
    AlignmentConfig,
    AssessmentConfig,
    ClassificationConfig,
    DetectionConfig,
    ExpansionConfig,
    ImageCounts,
    PopulationsConfig,
    QualityConfig,
    RunConfig,
    SamplingConfig,
    with_settings,
)
from popalign_core.errors import InvalidInput, UnknownName

_EMOJI = RunConfig(
    sampling=SamplingConfig(scheduler="dpm++", steps=10, guidance_scale=3.0, batch_size=64, shard_size=256),
    images=ImageCounts(train_neutral=12, train_specific=0, validation=24, evaluation=40, trained=4, obedience=4),
    populations=PopulationsConfig(
        winners="counterfactual", weighting="axis", overshoot=2, overshoot_axes=("perceived_gender",)
    ),
    alignment=AlignmentConfig(
        rounds=4,
        steps=30,
        learning_rate=3e-3,
        learning_rate_schedule="cosine",
        round_decay=0.8,
        first_timestep=350,
        anchor_weight=0,
        preserve_weight=3000,
        caption_mixing=0.6,
        trainable="conditioning",
    ),
)
_SDXL = RunConfig(
    model="stabilityai/stable-diffusion-xl-base-1.0",
    expansion=ExpansionConfig(
        prompts=("sdxl-occupations",),
        axes=("perceived_gender", "perceived_race"),
        controls=("people-and-things",),
    ),
    sampling=SamplingConfig(steps=30, batch_size=16, dtype="bfloat16"),
    images=ImageCounts(train_neutral=100, train_specific=10, validation=48, evaluation=100, trained=0, obedience=10),
    classification=ClassificationConfig(builder="ViT-L-14@datacomp_xl_s13b_b90k", judge="./judges/fairface"),
    detection=DetectionConfig(persons="PekingU/rtdetr_v2_r50vd"),
    populations=PopulationsConfig(size=100),
    quality=QualityConfig(scorers=("pickscore", "dinov2")),
    assessment=AssessmentConfig(targets=("us-cps-2022",)),
    alignment=AlignmentConfig(
        steps=250,
        pairs_per_step=8,
        learning_rate=1e-5,
        beta=5000,
        lora_rank=16,
        gradient_checkpointing=True,
        mixed_precision=True,
    ),
)
_PAPER = _SDXL.model_copy(
    update={
        "sampling": SamplingConfig(steps=50, batch_size=16, dtype="bfloat16"),
        "populations": PopulationsConfig(size=100, weighting="even"),
        "alignment": AlignmentConfig(
            # One training of 750 steps on one set of images, looked at five times.
            rounds=5,
            redraw=False,
            steps=150,
            pairs_per_step=8,
            learning_rate=5e-7,
            warmup_steps=200,
            timestep_sampling="uniform",
            beta=5000,
            anchor_weight=0,
            lora_rank=0,
            gradient_checkpointing=True,
            mixed_precision=True,
        ),
    }
)
PRESETS = {"emoji": _EMOJI, "sdxl": _SDXL, "sdxl-paper": _PAPER}
PresetName = Literal["emoji", "sdxl", "sdxl-paper"]


def preset(name: str) -> RunConfig:
    """A named configuration. Raises: UnknownName."""
    if name not in PRESETS:
        raise UnknownName(kind="preset", got=name, known=list(PRESETS))
    return PRESETS[name]


def chosen_config(name: str, settings: Sequence[str], config: RunConfig | None) -> RunConfig:
    """The configuration that a form or a command line asks for.

    settings: changes to the preset, each "stage.field=value". config: every value; then without settings.
    Raises: InvalidInput, UnknownName.
    """
    wanted = with_settings(preset(name), parse_settings(settings))
    if config is None:
        return wanted
    if settings:
        raise InvalidInput("got a whole configuration and settings as well: choose None for one of the two.")
    others = [other for other, values in PRESETS.items() if values.model == config.model]
    if wanted.model != config.model and others:
        raise InvalidInput(
            f"preset {name} is chosen, and the configuration beside it has the model of preset {others[0]}: choose "
            f"None for the configuration to take the preset's, or choose preset {others[0]}."
        )
    return config


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """A mapping from "stage.field=value". Raises: InvalidInput."""
    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InvalidInput(f"setting {setting!r} has no '=': write stage.field=value.")
        pairs[key.strip()] = value.strip()
    return pairs
