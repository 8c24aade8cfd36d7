"""What labels of published face-attribute classifiers (FairFace and its like) mean in our vocabularies."""

import re

from popalign_core.attributes import Axis

NO_PERSON = "no person"
_NO_PERSON_LABELS = {"no person", "no face", "none"}
# By axis: label, as `_plain` writes it, to group. FairFace's ages are decades; middle age is taken to begin at 40 and
# to end at 60, which is a convention.
_SYNONYMS: dict[str, dict[str, str]] = {
    "perceived_gender": {"male": "man", "female": "woman", "m": "man", "f": "woman", "men": "man", "women": "woman"},
    "perceived_race": {
        "caucasian": "white",
        "african": "black",
        "african american": "black",
        "east asian": "asian",
        "southeast asian": "asian",
        "latino": "latino hispanic",
        "hispanic": "latino hispanic",
        "south asian": "indian",
        "middle east": "middle eastern",
    },
    "perceived_age": {
        **dict.fromkeys(("0 2", "3 9", "10 19", "20 29", "30 39", "child", "teenager", "young adult"), "young"),
        **dict.fromkeys(("40 49", "50 59", "middle aged adult"), "middle-aged"),
        **dict.fromkeys(("60 69", "70", "more than 70", "over 70", "elderly", "senior"), "old"),
    },
}


def group_of(label: str, axis: Axis) -> str | None:
    """The group that a label means, `NO_PERSON` for one that says so, None where it is no group of the axis."""
    name = _plain(label)
    if name in _NO_PERSON_LABELS:
        return NO_PERSON
    known = {_plain(group): str(group) for group in axis.groups} | _SYNONYMS.get(axis.name, {})
    return known.get(name)


def label_fault(labels: list[str], axis: Axis) -> str:
    """What is wrong with the labels of a classifier for an axis, in words; empty where nothing is.

    A group without a label would be counted as zero in every image, which is no observation.
    """
    meant = {label: group_of(label, axis) for label in labels}
    if odd := [label for label, group in meant.items() if group is None]:
        return f"it tells {', '.join(odd)} apart, which are no groups of {axis.name}: {', '.join(axis.groups)}"
    if lacking := [group for group in axis.groups if group not in meant.values()]:
        return f"it has no label for {', '.join(lacking)} of {axis.name}, whose images it would call something else"
    return ""


def _plain(label: str) -> str:
    return re.sub(r"[\W_]+", " ", label.lower()).strip()
