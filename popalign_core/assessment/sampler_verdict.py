"""What a paired comparison of two samplers comes to: moved, within a margin, or open. Never "no difference"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from popalign_core.assessment.paired import DISPARITY, SHARE, UNKNOWN, PairedRow, holm
from popalign_core.errors import InvalidInput

LEVEL = 0.05
DEFAULT_MARGIN = 0.05


class Movement(StrEnum):
    """Of one row or of the whole. An interval that holds 0 and ends outside the margin shows nothing."""

    MOVED = "moved"
    WITHIN = "within"
    OPEN = "open"


@dataclass(frozen=True)
class SamplerVerdict:
    """movements: of each classifier's rows, in their order. reason: in one or two sentences."""

    movement: Movement
    reason: str
    movements: dict[str, list[Movement]]


def judge_sampler(rows: Mapping[str, Sequence[PairedRow]], margin: float = DEFAULT_MARGIN) -> SamplerVerdict:
    """Whether a fast sampler moves the population that a classifier perceives. rows: by classifier.

    Within: every interval lies inside the margin, which is equivalence by intervals and needs no correction for many
    rows. Moved: some interval lies to one side of 0 and not inside the margin, and its p-value holds after Holm's
    correction over the classifier's rows. Else open. Raises: InvalidInput.
    """
    if not 0 < margin < 1:
        raise InvalidInput(f"the margin is {margin:g}, a share between 0 and 1 is expected, for example 0.05.")
    movements = {name: _movements(own, margin) for name, own in rows.items()}
    placed = [
        (name, row, movement) for name, own in rows.items() for row, movement in zip(own, movements[name], strict=True)
    ]
    if not placed:
        raise InvalidInput("no row to judge a sampler by.")
    shifted = [(name, row) for name, row, movement in placed if movement is Movement.MOVED]
    if shifted:
        name, row = max(shifted, key=lambda found: abs(found[1].difference))
        more = f", and {len(shifted) - 1} more" if len(shifted) > 1 else ""
        reason = (
            f"the fast sampler moves the population: {_named(row)} {_change(row)} by {name}{more}. "
            "Populations of the two samplers are not to be compared with one another."
        )
        return SamplerVerdict(Movement.MOVED, reason, movements)
    if all(movement is Movement.WITHIN for _, _, movement in placed):
        reason = (
            f"all {len(placed)} shares, unknowns and disparities stay within {margin:g} of the exact sampler's, "
            "whole 95% intervals included."
        )
        return SamplerVerdict(Movement.WITHIN, reason, movements)
    open_rows = [(name, row) for name, row, movement in placed if movement is Movement.OPEN]
    name, row = max(open_rows, key=lambda found: _reach(found[1]))
    reason = (
        f"not shown to move the population, and not shown to stay within {margin:g} either: {len(open_rows)} of "
        f"{len(placed)} intervals reach beyond, the furthest {_named(row)} {_change(row)} by {name}. "
        "More images narrow them (images.evaluation, or more prompts)."
    )
    return SamplerVerdict(Movement.OPEN, reason, movements)


def _movements(rows: Sequence[PairedRow], margin: float) -> list[Movement]:
    found: list[Movement] = []
    for row, p in zip(rows, holm([row.p_value for row in rows]), strict=True):
        if -margin < row.difference_low and row.difference_high < margin:
            found.append(Movement.WITHIN)
        elif (row.difference_low > 0 or row.difference_high < 0) and p < LEVEL:
            found.append(Movement.MOVED)
        else:
            found.append(Movement.OPEN)
    return found


def _reach(row: PairedRow) -> float:
    # A row without a known image has no interval, and nothing reaches further.
    ends = [abs(end) for end in (row.difference_low, row.difference_high) if end == end]
    return max(ends, default=float("inf"))


def _named(row: PairedRow) -> str:
    axis = row.axis.replace("_", " ")
    words = {SHARE: f"the share of {row.group} ({axis})", UNKNOWN: f"unknown images ({axis})"}
    return words.get(row.measure, f"the disparity of {axis}" if row.measure == DISPARITY else row.measure)


def _change(row: PairedRow) -> str:
    interval = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
    return f"{row.exact:.3f} to {row.fast:.3f}, {interval}, n = {row.n}"
