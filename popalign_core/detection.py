"""Who is in an image: boxes of persons and faces, what is cut out for a classifier, and the image's label from several.

Detection is off unless a detector is configured; an image is then classified as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from popalign_core.attributes import Axis
from popalign_core.classification import Attribution, AxisProbabilities, Status, attribute

Kind = Literal["person", "face"]
Rule = Literal["largest", "all", "none"]
# The position of the whole image among what is classified of it; boxes count from 1.
WHOLE = 0


@dataclass(frozen=True)
class Box:
    """Pixels, right and bottom exclusive. confidence: the detector's, 0 to 1."""

    left: int
    top: int
    right: int
    bottom: int
    confidence: float

    @property
    def area(self) -> int:
        """Pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


class Detector(Protocol):
    """Anything that finds persons, or faces."""

    @property
    def detector_id(self) -> str:
        """Name and digest of weights, as it stands in every row."""
        ...

    def find(self, images: np.ndarray) -> list[list[Box]]:
        """Boxes of every image, none where it sees nobody. images: uint8 (n, h, w, 3)."""
        ...


@dataclass(frozen=True)
class Found:
    """One image. None: that kind was not looked for."""

    persons: tuple[Box, ...] | None = None
    faces: tuple[Box, ...] | None = None

    @property
    def regions(self) -> tuple[Box, ...]:
        """What is classified: faces where they were looked for, else persons."""
        return (self.faces if self.faces is not None else self.persons) or ()

    @property
    def absent(self) -> Status:
        """What an image without a region is."""
        return Status.NO_FACE if self.persons is None or self.persons else Status.NO_PERSON


@dataclass(frozen=True)
class View:
    """One picture to classify. image: its position; region: WHOLE, or the position of a box, from 1."""

    image: int
    region: int


def detect(detectors: Mapping[Kind, Detector], images: np.ndarray) -> list[Found]:
    """Persons and faces of every image, each the largest first."""

    def boxes(kind: Kind) -> list[tuple[Box, ...] | None]:
        if kind not in detectors:
            return [None] * len(images)
        return [tuple(sorted(own, key=lambda box: -box.area)) for own in detectors[kind].find(images)]

    return [Found(persons, faces) for persons, faces in zip(boxes("person"), boxes("face"), strict=True)]


def views_of(count: int, found: Sequence[Found] | None, *, whole: bool) -> list[View]:
    """What is classified of so many images, image by image. whole: the whole image beside its boxes.

    Without detection it is the whole image in any case.
    """
    if found is None:
        return [View(image, WHOLE) for image in range(count)]
    return [
        View(image, region)
        for image, own in enumerate(found)
        for region in range(WHOLE if whole else 1, len(own.regions) + 1)
    ]


def square_around(box: Box, height: int, width: int, margin: float) -> tuple[slice, slice]:
    """Rows and columns of a square around a box, as far as the image reaches; classifiers expect squares.

    margin: added on each side, a share of the box's longer side. Where the square is larger than the image, the top of
    the box stays in it: that is where a person's head is.
    """
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(1, min(round(longer * (1 + 2 * margin)), height, width))
    left = (box.left + box.right - side) // 2
    top = (box.top + box.bottom - side) // 2 if side >= box.bottom - box.top else box.top
    left, top = min(max(left, 0), width - side), min(max(top, 0), height - side)
    return slice(top, top + side), slice(left, left + side)


def cut(images: np.ndarray, views: Sequence[View], found: Sequence[Found] | None, margin: float) -> list[np.ndarray]:
    """The pixels of every view, uint8 (h, w, 3) each, of several sizes. images: uint8 (n, h, w, 3)."""
    height, width = images.shape[1:3]
    pictures: list[np.ndarray] = []
    for view in views:
        image = images[view.image]
        if view.region != WHOLE and found is not None:
            box = found[view.image].regions[view.region - 1]
            image = image[square_around(box, height, width, margin)]
        pictures.append(image)
    return pictures


@dataclass(frozen=True)
class AxisLabels:
    """The outcomes on one axis. images: by image; views: by view, in their order."""

    images: list[Attribution]
    views: list[Attribution]


def label_views(
    outcomes: Sequence[AxisProbabilities],
    views: Sequence[View],
    found: Sequence[Found] | None,
    *,
    min_confidence: float,
    rule: Rule,
) -> list[AxisLabels]:
    """Outcomes of views and images on every axis, from the probabilities of the views."""
    labels = [attribute(outcome, min_confidence=min_confidence) for outcome in outcomes]
    return [
        AxisLabels(image_labels(outcome.axis, views, own, found, rule), own)
        for outcome, own in zip(outcomes, labels, strict=True)
    ]


def image_labels(
    axis: Axis, views: Sequence[View], labels: Sequence[Attribution], found: Sequence[Found] | None, rule: Rule
) -> list[Attribution]:
    """The outcome of every image on an axis, from the labels of its views in the same order.

    rule, where an image has several regions: `largest` takes the label of the largest; `all` takes a label that all
    have with status ok, and the least sure of them; `none` takes no label. Without one the status is `several`. An axis
    of a whole scene (a couple) takes the whole image's label, if there is anybody.
    """
    by_view = {(view.image, view.region): label for view, label in zip(views, labels, strict=True)}
    if found is None:
        return [by_view[view.image, WHOLE] for view in views]
    return [_image_label(axis, image, own, by_view, rule) for image, own in enumerate(found)]


def _image_label(
    axis: Axis, image: int, found: Found, by_view: Mapping[tuple[int, int], Attribution], rule: Rule
) -> Attribution:
    if not found.regions:
        return unlabelled(axis, found.absent)
    if axis.whole_scene:
        return by_view[image, WHOLE]
    own = [by_view[image, region] for region in range(1, len(found.regions) + 1)]
    if rule == "largest" or len(own) == 1:
        return own[0]
    agreed = len({label.label for label in own}) == 1 and all(label.status is Status.OK for label in own)
    if rule == "all" and agreed:
        return min(own, key=lambda label: label.confidence)
    return unlabelled(axis, Status.SEVERAL)


def unlabelled(axis: Axis, status: Status) -> Attribution:
    """An image that no group is told of."""
    return Attribution(axis.name, None, 0.0, (0.0,) * len(axis.groups), status)
