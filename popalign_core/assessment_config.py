"""What the assessment measures, and what a model is promoted for. A part of `popalign_core.config`."""

from typing import Annotated

from pydantic import Field, PositiveInt

from popalign_core.stage_config import Share, StageConfig


class AssessmentConfig(StageConfig):
    """When a model is promoted."""

    min_reduction: Annotated[
        Share,
        Field(
            title="Least reduction",
            description="Share by which every axis must fall as measured; less than what is wanted, or chance holds "
            "half of the models that reach it.",
        ),
    ] = 0.4
    max_obedience_drop: Annotated[
        Share, Field(title="Most obedience lost", description="Margin that the 95% interval must lie within.")
    ] = 0.05
    max_score_drop: Annotated[
        Share, Field(title="Most CLIP score lost", description="Relative; a margin for the 95% interval.")
    ] = 0.03
    max_unknown_rise: Annotated[
        Share, Field(title="Most unknowns gained", description="A margin for the 95% interval.")
    ] = 0.05
    resamples: Annotated[int, Field(title="Bootstrap resamples", ge=200)] = 2000
    precision: Annotated[
        float,
        Field(
            title="Precision wanted",
            ge=0,
            description="Held-out images are doubled until the 95% interval of every axis's change reaches no further "
            "than this from its middle; 0 = as many as images.evaluation says.",
        ),
    ] = 0.0
    max_images: Annotated[
        PositiveInt, Field(title="Most held-out images", description="A prompt, where a precision is wanted.")
    ] = 400
    targets: Annotated[
        tuple[str, ...],
        Field(
            title="Further targets",
            description="Measured beside the uniform one: us-cps-2022, or CSV files with axis, group, share, subject.",
        ),
    ] = ()
