"""Which further models score the assessment's images. A part of `popalign_core.config`."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, field_validator

from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.stage_config import StageConfig


@dataclass(frozen=True)
class ScorerKind:
    """What a kind of scorer gives. default: hub id, or empty where a folder must be named.

    unit: of a score, or empty where features come out, in which sets of images are compared by `distances`.
    """

    default: str
    unit: str = ""
    distances: tuple[str, ...] = ()


SCORERS = {
    "pickscore": ScorerKind("yuvalkirstain/PickScore_v1", "model's scale x cosine"),
    "hps": ScorerKind("", "100 x cosine"),
    "aesthetics": ScorerKind("", "mean rating, 1 to 10"),
    "vqa": ScorerKind("HuggingFaceTB/SmolVLM-256M-Instruct", "probability of yes"),
    "dinov2": ScorerKind("facebook/dinov2-large", distances=("fd_dinov2",)),
    "clip_vision": ScorerKind("openai/clip-vit-large-patch14-336", distances=("cmmd",)),
    "inception": ScorerKind("", distances=("fid", "kid")),
}


def parse_scorer(text: str) -> tuple[str, str]:
    """(kind, source) of "kind=source", or of a kind alone that has a source of its own.

    Raises: UnknownName, InvalidInput.
    """
    kind, _, source = (part.strip() for part in text.partition("="))
    if kind not in SCORERS:
        raise UnknownName(kind="scorer", got=kind, known=list(SCORERS))
    if not (source or SCORERS[kind].default):
        raise InvalidInput(f"quality.scorers: {kind} needs the folder of its weights: {kind}=FOLDER.")
    return kind, source or SCORERS[kind].default


class QualityConfig(StageConfig):
    """Scores and distances of the assessment's images beside the CLIP score of the builder's model."""

    scorers: Annotated[
        tuple[str, ...],
        Field(
            title="Scorers",
            description=f"{', '.join(SCORERS)}: each as kind, or kind=folder or hub id. Every one costs a pass over "
            "the assessment's images.",
        ),
    ] = ()
    max_drop: Annotated[
        float,
        Field(
            title="Most quality lost",
            gt=0,
            description="A margin for the 95% interval of every score's fall, in standard deviations between the base "
            "model's images.",
        ),
    ] = 0.2

    @field_validator("scorers")
    @classmethod
    def _known(cls, scorers: tuple[str, ...]) -> tuple[str, ...]:
        try:
            kinds = [parse_scorer(text)[0] for text in scorers]
        except (InvalidInput, UnknownName) as error:
            raise ValueError(str(error)) from error
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise ValueError(f"{', '.join(twice)} stands there twice; one of a kind is scored")
        return scorers

    @property
    def sources(self) -> dict[str, str]:
        """Folder or hub id by kind."""
        return dict(map(parse_scorer, self.scorers))
