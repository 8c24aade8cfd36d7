"""Whether held-out images are enough: sampling goes on until the interval of what changed is narrow."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reason = Literal["too wide", "narrow enough", "no more images allowed", "more prompts are needed, not images"]
# Twice the images narrow an interval by .71 where images are what makes it wide.
LEAST_GAIN = 0.9


@dataclass(frozen=True)
class Precision:
    """half_width: of the 95% interval of an axis's change. reason: why sampling goes on, or does not."""

    half_width: float
    reason: Reason


def judge_precision(
    half_widths: Mapping[str, float],
    earlier: Mapping[str, float],
    *,
    wanted: float,
    images: int,
    most: int,
) -> dict[str, Precision]:
    """By axis; "too wide" is said where twice the images are worth drawing. nan (nothing measured) is never narrow.

    half_widths: now, at `images` a prompt. earlier: at half as many, empty at first. most: images a prompt allowed.
    """
    return {
        axis: Precision(width, _reason(width, earlier.get(axis), wanted, images, most))
        for axis, width in half_widths.items()
    }


def _reason(width: float, earlier: float | None, wanted: float, images: int, most: int) -> Reason:
    if width <= wanted:
        return "narrow enough"
    if 2 * images > most:
        return "no more images allowed"
    if earlier is not None and width > LEAST_GAIN * earlier:
        return "more prompts are needed, not images"
    return "too wide"


def images_after(first: int, steps: int) -> int:
    """Held-out images a prompt after so many steps: each doubles them."""
    return first * 2**steps
