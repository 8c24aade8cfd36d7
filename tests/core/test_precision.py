"""When more images are worth drawing, and what asking again and again does to an interval."""

import math

import numpy as np

from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.precision import images_after, judge_precision
from popalign_core.assessment.uncertainty import compare

UNIFORM = np.array([0.5, 0.5])


def reasons(now: dict[str, float], earlier: dict[str, float], **more) -> dict[str, str]:
    settings = {"wanted": 0.05, "images": 40, "most": 400} | more
    return {axis: found.reason for axis, found in judge_precision(now, earlier, **settings).items()}


def test_each_axis_says_why() -> None:
    assert reasons({"a": 0.05, "b": 0.06}, {}) == {"a": "narrow enough", "b": "too wide"}
    assert reasons({"a": 0.07}, {"a": 0.1}) == {"a": "too wide"}
    assert reasons({"a": 0.095}, {"a": 0.1}) == {"a": "more prompts are needed, not images"}
    assert reasons({"a": 0.07}, {"a": 0.1}, images=201) == {"a": "no more images allowed"}
    assert reasons({"a": math.nan}, {}, images=201) == {"a": "no more images allowed"}


def test_each_step_doubles() -> None:
    assert [images_after(24, steps) for steps in range(3)] == [24, 48, 96]


def test_an_interval_that_is_asked_for_again_and_again_still_covers() -> None:
    """What ends sampling is the width, which says little of where the middle lies."""
    rng, prompts, wanted, covered, steps = np.random.default_rng(0), 12, 0.09, 0, []
    for _ in range(200):
        # Shares of men before and after; the true change is that of many images.
        before, after = rng.uniform(0.6, 0.95, prompts), rng.uniform(0.4, 0.75, prompts)
        counts = [np.zeros((prompts, 2), int) for _ in range(2)]
        images, earlier = 16, {}
        drawn = 0
        while True:
            for side, shares in zip(counts, (before, after), strict=True):
                men = rng.binomial(images - drawn, shares)
                side += np.stack([men, images - drawn - men], axis=1)
            drawn = images
            change = compare(counts[0], counts[1], UNIFORM, l2_discrepancy, rng=rng, resamples=200)
            width = {"a": (change.difference.high - change.difference.low) / 2}
            found = judge_precision(width, earlier, wanted=wanted, images=images, most=256)["a"]
            if found.reason != "too wide":
                break
            images, earlier = 2 * images, width
        steps.append(found.reason)
        # Of prompts like these: uniform shares, disparities sqrt(2) |share - 1/2| at so many images.
        covered += change.difference.low <= expected_change(images) <= change.difference.high
    assert len(set(steps)) > 1
    assert covered / 200 > 0.89  # 95% less four standard deviations of 200 draws


def expected_change(images: int) -> float:
    """The mean change over prompts, the part that sampling adds to both sides included."""
    rng = np.random.default_rng(1)

    def mean(low: float, high: float) -> float:
        men = rng.binomial(images, rng.uniform(low, high, 20000))
        return float(l2_discrepancy(np.stack([men, images - men], axis=1), UNIFORM).mean())

    return mean(0.4, 0.75) - mean(0.6, 0.95)
