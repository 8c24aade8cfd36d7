"""Perceived attributes from class probabilities. Every image gets an outcome on every axis; none is dropped."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from popalign_core.attributes import Axis

# uint8 (n, h, w, 3), or n arrays (h, w, 3) of several sizes.
Pictures = np.ndarray | Sequence[np.ndarray]


class Status(StrEnum):
    """What a classifier could say of an image on an axis. Only `ok` carries a group that is counted.

    no_face: somebody is there, and no face was found. several: several people, and no rule to choose a label.
    """

    OK = "ok"
    LOW_CONFIDENCE = "low_confidence"
    NO_PERSON = "no_person"
    NO_FACE = "no_face"
    SEVERAL = "several"
    ERROR = "error"


@dataclass(frozen=True)
class AxisProbabilities:
    """probabilities: (images, groups), rows sum to 1 given a person. no_person: (images,) probability of no person."""

    axis: Axis
    probabilities: np.ndarray
    no_person: np.ndarray


@dataclass(frozen=True)
class Attribution:
    """One image on one axis. label is None unless status is `ok` or `low_confidence` (then the best guess)."""

    axis: str
    label: str | None
    confidence: float
    probabilities: tuple[float, ...]
    status: Status


class AttributeClassifier(Protocol):
    """Anything that gives probabilities of perceived groups."""

    @property
    def classifier_id(self) -> str:
        """Name and digest of weights, as it stands in every row."""
        ...

    def probabilities(self, images: Pictures, axes: Sequence[Axis]) -> list[AxisProbabilities]:
        """One entry an axis."""
        ...


def attribute(outcome: AxisProbabilities, *, min_confidence: float, max_no_person: float = 0.5) -> list[Attribution]:
    """The outcome of every image: no_person before low_confidence before ok; `error` where a probability is no number.

    min_confidence: least probability of the best group, 0 to 1.
    """
    groups = outcome.axis.groups
    rows: list[Attribution] = []
    for values, no_person in zip(outcome.probabilities, outcome.no_person, strict=True):
        if not (np.isfinite(values).all() and np.isfinite(no_person)):
            rows.append(Attribution(outcome.axis.name, None, 0.0, tuple([0.0] * len(groups)), Status.ERROR))
            continue
        best = int(values.argmax())
        confidence = float(values[best])
        label: str | None = groups[best]
        status = Status.OK
        if no_person > max_no_person:
            status, label = Status.NO_PERSON, None
        elif confidence < min_confidence:
            status = Status.LOW_CONFIDENCE
        rows.append(Attribution(outcome.axis.name, label, confidence, tuple(float(v) for v in values), status))
    return rows


def softmax(logits: np.ndarray) -> np.ndarray:
    """Row-wise softmax, shape kept."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
