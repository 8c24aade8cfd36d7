"""Who is found, what is cut out, and which label an image of several people gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from popalign_core.attributes import AXES
from popalign_core.classification import Attribution, Status
from popalign_core.detection import (
    WHOLE,
    Box,
    Detector,
    Found,
    View,
    cut,
    detect,
    image_labels,
    square_around,
    views_of,
)

GENDER, COUPLE = AXES["perceived_gender"], AXES["perceived_couple"]
SMALL, LARGE = Box(0, 0, 4, 4, 0.9), Box(10, 10, 20, 26, 0.6)


class FixedDetector:
    """Finds what is written down for the images in their order."""

    detector_id = "detector:fixed@0"

    def __init__(self, boxes: list[list[Box]]):
        self.boxes = boxes

    def find(self, images: np.ndarray) -> list[list[Box]]:
        return self.boxes[: len(images)]


def said(label: str | None, status: Status = Status.OK, confidence: float = 0.9) -> Attribution:
    return Attribution(GENDER.name, label, confidence, (confidence, 1 - confidence), status)


def label_of(found: Found, labels: dict[int, Attribution], rule: str, axis=GENDER) -> tuple[Status, str | None]:
    views = [View(0, region) for region in labels]
    (image,) = image_labels(axis, views, list(labels.values()), [found], rule)
    return image.status, image.label


def test_both_kinds_are_found_largest_first_and_one_that_is_not_looked_for_is_none() -> None:
    images = np.zeros((2, 32, 32, 3), np.uint8)
    persons: Detector = FixedDetector([[SMALL, LARGE], []])
    found = detect({"person": persons}, images)
    assert found == [Found((LARGE, SMALL), None), Found((), None)]
    assert [own.regions for own in found] == [(LARGE, SMALL), ()]
    both = detect({"person": persons, "face": FixedDetector([[SMALL], []])}, images)
    assert [own.regions for own in both] == [(SMALL,), ()]


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (Found((), None), Status.NO_PERSON),
        (Found((), ()), Status.NO_PERSON),
        (Found((LARGE,), ()), Status.NO_FACE),
        (Found(None, ()), Status.NO_FACE),
    ],
)
def test_an_image_without_anybody_says_what_was_not_found(found: Found, status: Status) -> None:
    (image,) = image_labels(GENDER, [View(0, WHOLE)], [said("man")], [found], "largest")
    assert (image.status, image.label, image.confidence, image.probabilities) == (status, None, 0.0, (0.0, 0.0))


TWO = Found((LARGE, SMALL), None)


@pytest.mark.parametrize(
    ("labels", "largest", "agreed", "none"),
    [
        ((said("man"), said("man", confidence=0.7)), "man", "man", None),
        ((said("man"), said("woman")), "man", None, None),
        ((said("man"), said("man", Status.LOW_CONFIDENCE)), "man", None, None),
        ((said(None, Status.NO_PERSON), said("man")), None, None, None),
    ],
)
def test_the_rule_chooses_the_label_of_several(labels, largest, agreed, none) -> None:
    by_region = dict(enumerate(labels, start=1))
    assert label_of(TWO, by_region, "largest") == (labels[0].status, largest)
    for rule, expected in (("all", agreed), ("none", none)):
        assert label_of(TWO, by_region, rule) == (Status.OK if expected else Status.SEVERAL, expected)
    one = Found((LARGE,), None)
    for rule in ("largest", "all", "none"):
        assert label_of(one, {1: labels[0]}, rule) == (labels[0].status, labels[0].label)


def test_a_label_that_all_share_is_as_sure_as_the_least_sure() -> None:
    labels = [said("man"), said("man", confidence=0.7)]
    (image,) = image_labels(GENDER, [View(0, 1), View(0, 2)], labels, [TWO], "all")
    assert image.confidence == 0.7


def test_a_couple_is_a_matter_of_the_whole_scene_if_anybody_is_there() -> None:
    whole = Attribution(COUPLE.name, "two women", 0.9, (0.0, 0.1, 0.9), Status.OK)
    views = [View(0, WHOLE), View(1, WHOLE)]
    found = image_labels(COUPLE, views, [whole, whole], [TWO, Found((), None)], "none")
    assert [(image.status, image.label) for image in found] == [(Status.OK, "two women"), (Status.NO_PERSON, None)]


def test_without_detection_every_image_is_one_view_and_has_its_label() -> None:
    views = views_of(2, None, whole=False)
    assert views == [View(0, WHOLE), View(1, WHOLE)]
    labels = [said("man"), said(None, Status.NO_PERSON)]
    assert image_labels(GENDER, views, labels, None, "none") == labels


def test_views_are_the_boxes_and_the_whole_image_where_it_is_asked_for() -> None:
    found = [TWO, Found((), None)]
    assert views_of(2, found, whole=False) == [View(0, 1), View(0, 2)]
    assert views_of(2, found, whole=True) == [View(0, 0), View(0, 1), View(0, 2), View(1, 0)]
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    pictures = cut(images, views_of(2, found, whole=True), found, margin=0.0)
    assert [picture.shape for picture in pictures] == [(32, 32, 3), (16, 16, 3), (4, 4, 3), (32, 32, 3)]
    assert np.array_equal(pictures[1], images[0, 10:26, 7:23])


@given(
    box=st.tuples(st.integers(0, 90), st.integers(0, 60), st.integers(1, 100), st.integers(1, 70)),
    margin=st.floats(0, 1),
)
def test_what_is_cut_is_a_square_inside_the_image_that_keeps_the_top_of_the_box(box, margin) -> None:
    left, top, right, bottom = box[0], box[1], min(box[0] + box[2], 100), min(box[1] + box[3], 70)
    rows, columns = square_around(Box(left, top, right, bottom, 1.0), 70, 100, margin)
    assert rows.stop - rows.start == columns.stop - columns.start > 0
    assert rows.start >= 0
    assert columns.start >= 0
    assert rows.stop <= 70
    assert columns.stop <= 100
    assert rows.start <= top < rows.stop
    if right - left <= rows.stop - rows.start:
        assert columns.start <= left
        assert right <= columns.stop
