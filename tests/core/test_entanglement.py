"""What changes outside the person, by hand and where the group did or did not change."""

import numpy as np
import pytest

from popalign_core.assessment.entanglement import entanglement, outside_change
from popalign_core.detection import Box
from popalign_core.errors import InvalidInput


def test_only_pixels_outside_all_boxes_count() -> None:
    base = np.zeros((10, 10, 3), np.uint8)
    aligned = base.copy()
    aligned[2:6, 2:6] = 255  # the person
    aligned[0, :] = 51  # a tenth of the picture, by a fifth
    boxes = [Box(2, 2, 6, 6, 0.9)]
    assert outside_change(base, aligned, boxes) == pytest.approx(0.2 * 10 / (100 - 16))
    assert outside_change(base, aligned, [*boxes, Box(0, 0, 10, 1, 0.9)]) == 0.0
    assert np.isnan(outside_change(base, aligned, [Box(-3, 0, 10, 10, 0.9)]))
    assert outside_change(aligned, base, boxes) == outside_change(base, aligned, boxes)  # no wrap of 8 bits
    with pytest.raises(InvalidInput, match="one size"):
        outside_change(base, aligned[:5], boxes)


def test_pairs_are_told_apart_by_whether_their_group_changed() -> None:
    values = np.array([0.5, 0.3, 0.1, 0.1, 0.9, np.nan])
    before = ["man", "man", "man", "woman", None, "man"]
    after = ["woman", "woman", "man", "woman", "man", "man"]
    changed, same = entanglement(
        "a", values, before, after, ["p", "q", "p", "q", "p", "q"], rng=np.random.default_rng(0), resamples=200
    )
    assert (changed.changed, changed.estimate.value, changed.estimate.n) == (True, pytest.approx(0.4), 2)
    assert (same.changed, same.estimate.value, same.estimate.n) == (False, pytest.approx(0.1), 2)
    assert changed.left_out == same.left_out == 2
    none, _ = entanglement("a", values[2:4], before[2:4], after[2:4], ["p", "q"], rng=np.random.default_rng(0))
    assert none.estimate is None
