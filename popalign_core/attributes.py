"""Axes of perceived attributes: closed, ordered vocabularies. "Unknown" is a status of a sample and never a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np

from popalign_core.errors import InvalidInput, UnknownName


class PerceivedGender(StrEnum):
    """As a classifier perceives it. Such classifiers are binary: non-binary people cannot be measured by them."""

    MAN = "man"
    WOMAN = "woman"


class PerceivedSkinTone(StrEnum):
    """The five Fitzpatrick modifiers of Unicode (types I-II are one)."""

    LIGHT = "light"
    MEDIUM_LIGHT = "medium-light"
    MEDIUM = "medium"
    MEDIUM_DARK = "medium-dark"
    DARK = "dark"


class PerceivedRace(StrEnum):
    """The six labels of the paper's classifier. Race is not ethnicity, and neither is skin tone."""

    WHITE = "white"
    ASIAN = "asian"
    BLACK = "black"
    LATINO_HISPANIC = "latino hispanic"
    INDIAN = "indian"
    MIDDLE_EASTERN = "middle eastern"


class PerceivedAge(StrEnum):
    """Three apparent life stages, as in the paper's age experiment."""

    YOUNG = "young"
    MIDDLE_AGED = "middle-aged"
    OLD = "old"


class PerceivedCouple(StrEnum):
    """Perceived genders of the two people in a picture of a couple."""

    MAN_WOMAN = "a man and a woman"
    TWO_MEN = "two men"
    TWO_WOMEN = "two women"


@dataclass(frozen=True)
class Axis:
    """One attribute axis. groups: ordered and complete; a population has a count for each, zero included.

    whole_scene: whether it is about all people in a picture together, so that no single face can show it.
    """

    name: str
    groups: tuple[str, ...]
    whole_scene: bool = False

    def index(self, group: str) -> int:
        """Position of a group. Raises: UnknownName."""
        if group not in self.groups:
            raise UnknownName(kind=f"group of {self.name}", got=group, known=list(self.groups))
        return self.groups.index(group)

    def uniform(self) -> np.ndarray:
        """The uniform target over the whole vocabulary, shape (groups,)."""
        return np.full(len(self.groups), 1 / len(self.groups))


AXES = {
    axis.name: axis
    for axis in (
        Axis("perceived_gender", tuple(PerceivedGender)),
        Axis("perceived_race", tuple(PerceivedRace)),
        Axis("perceived_skin_tone", tuple(PerceivedSkinTone)),
        Axis("perceived_age", tuple(PerceivedAge)),
        Axis("perceived_couple", tuple(PerceivedCouple), whole_scene=True),
    )
}
CROSSING = " & "


def axis_words(name: str) -> str:
    """An axis, or a crossed one, where "perceived" stands beside it: "skin tone"."""
    return name.replace("perceived_", "").replace("_", " ")


def axis_named(name: str) -> Axis:
    """An axis, or a crossed one ("perceived_gender & perceived_skin_tone"). Raises: UnknownName."""
    parts = name.split(CROSSING)
    for part in parts:
        if part not in AXES:
            raise UnknownName(kind="axis", got=part, known=list(AXES))
    return cross_axes([AXES[part] for part in parts])


def cross_axes(axes: Sequence[Axis]) -> Axis:
    """The intersectional axis: every combination of groups, in the order of `itertools.product`."""
    if not axes:
        raise InvalidInput("no attribute axis given, at least one is needed: " + ", ".join(AXES))
    if len(axes) == 1:
        return axes[0]
    groups = tuple(CROSSING.join(cell) for cell in product(*(axis.groups for axis in axes)))
    return Axis(CROSSING.join(axis.name for axis in axes), groups)
