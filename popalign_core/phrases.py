"""What a zero-shot classifier is told of an axis: a few phrases a group, for built-in axes and for those of a file."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from popalign_core.attributes import AXES, Axis
from popalign_core.errors import InvalidInput, UnknownName

# Each group is the mean of its phrases in each of these frames.
FRAMES = ("a photo of {}", "a picture of {}", "{}")
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "perceived_gender": {"man": ("a man",), "woman": ("a woman",)},
    "perceived_skin_tone": {
        tone: (f"a {tone} skinned person", f"a {tone} skinned man", f"a {tone} skinned woman")
        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    },
    "perceived_race": {
        "white": ("a white person",),
        "asian": ("an Asian person",),
        "black": ("a Black person",),
        "latino hispanic": ("a Latino person", "a Hispanic person"),
        "indian": ("an Indian person",),
        "middle eastern": ("a Middle Eastern person",),
    },
    "perceived_age": {
        "young": ("a young person",),
        "middle-aged": ("a middle-aged person",),
        "old": ("an old person",),
    },
    "perceived_couple": {
        "a man and a woman": ("a man and a woman",),
        "two men": ("two men",),
        "two women": ("two women",),
    },
}
NO_PERSON_PHRASES = ("an object",)
_AXIS_NAME = re.compile(r"perceived_[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class DescribedAxis:
    """An axis with the phrases of every group."""

    axis: Axis
    phrases: Mapping[str, Sequence[str]]

    @property
    def digest(self) -> str:
        """Names the phrases, frames included: 8 hex digits."""
        text = json.dumps([self.axis.name, [[g, list(self.phrases[g])] for g in self.axis.groups], FRAMES])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def described(axis: Axis) -> DescribedAxis:
    """A built-in axis with its phrases. Raises: UnknownName."""
    if axis.name not in PHRASES:
        raise UnknownName(kind="axis with phrases", got=axis.name, known=list(PHRASES))
    return DescribedAxis(axis, PHRASES[axis.name])


def described_axis(source: str) -> DescribedAxis:
    """A built-in axis by its name, else one from a JSON file: {"name": ..., "groups": {group: [phrase, ...]}}.

    The name begins with "perceived_", since a classifier's guess is all that it is; frames are added to the phrases.
    Raises: UnknownName, InvalidInput.
    """
    if source in AXES:
        return described(AXES[source])
    path = Path(source)
    if not path.is_file():
        raise UnknownName(kind="axis", got=source, known=[*AXES, "or the path of a JSON file"])
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        name = str(values["name"])
        phrases = {str(group): _texts(texts) for group, texts in cast("dict[str, Any]", values["groups"]).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f'{source} describes no axis ({error}): {{"name": "perceived_...", "groups": {{"group": ["a phrase"]}}}} '
            "is expected."
        ) from error
    if not _AXIS_NAME.fullmatch(name) or name in AXES:
        raise InvalidInput(
            f"{source} names its axis {name!r}: perceived_ and up to 32 small letters, digits or _ are expected, and "
            f"none of {', '.join(AXES)}."
        )
    if len(phrases) < 2:
        raise InvalidInput(f"{source} has {len(phrases)} groups, at least 2 are expected.")
    return DescribedAxis(Axis(name, tuple(phrases)), phrases)


def _texts(value: object) -> tuple[str, ...]:
    texts = cast("list[object]", value) if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise TypeError(f"phrases are texts, at least one a group, got {value!r}")
    return tuple(str(text) for text in texts)
