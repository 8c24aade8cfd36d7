"""Whether images of identity-specific prompts show the group that the prompt names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.resampling import (
    DEFAULT_RESAMPLES,
    Bootstrap,
    Comparison,
    Estimate,
    estimate_ratio,
    require_same_prompts,
    resample_prompts,
    sums_by_prompt,
)
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput


@dataclass(frozen=True)
class Answers:
    """For every image the group that its prompt names, the perceived one (None = unknown), and the prompt's id."""

    requested: Sequence[str]
    perceived: Sequence[str | None]
    prompt_ids: Sequence[str]

    def __post_init__(self) -> None:
        lengths = {len(self.requested), len(self.perceived), len(self.prompt_ids)}
        if len(lengths) != 1 or not self.requested:
            raise InvalidInput(f"obedience needs the same number of images in each list, at least one; got {lengths}.")


@dataclass(frozen=True)
class Obedience:
    """Share of images that show the requested group.

    among_known: unknown images left out. unknown_is_wrong: counted as wrong, which no rise of unknowns can hide.
    """

    among_known: Estimate
    unknown_is_wrong: Estimate


def obedience(
    requested: Sequence[str],
    perceived: Sequence[str | None],
    prompt_ids: Sequence[str],
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Obedience:
    """Compares groups as a whole, never as a part of a word; intervals by drawing prompts. Raises: InvalidInput."""
    answers = Answers(requested, perceived, prompt_ids)
    picks = resample_prompts(len(set(prompt_ids)), rng, resamples)
    return Obedience(_share(answers, picks).estimate, _share(answers, picks, unknown_is_wrong=True).estimate)


def compare_obedience(
    before: Answers,
    after: Answers,
    *,
    unknown_is_wrong: bool = False,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> Comparison:
    """Shares before and after, paired by prompt: the same drawn prompts on both sides. Raises: InvalidInput."""
    names = sorted(set(before.prompt_ids))
    require_same_prompts(names, sorted(set(after.prompt_ids)))
    picks = resample_prompts(len(names), rng, resamples)
    return _share(after, picks, unknown_is_wrong=unknown_is_wrong).compared_with(
        _share(before, picks, unknown_is_wrong=unknown_is_wrong)
    )


def confusion_matrix(requested: Sequence[str], perceived: Sequence[str | None], axis: Axis) -> np.ndarray:
    """Images by requested (rows) and perceived group (columns), the last column unknown: (groups, groups + 1).

    Raises: UnknownName.
    """
    groups = len(axis.groups)
    counts = np.zeros((groups, groups + 1), dtype=np.int64)
    for asked, seen in zip(requested, perceived, strict=True):
        counts[axis.index(asked), groups if seen is None else axis.index(seen)] += 1
    return counts


def _share(answers: Answers, picks: np.ndarray, *, unknown_is_wrong: bool = False) -> Bootstrap:
    pairs = list(zip(answers.requested, answers.perceived, strict=True))
    prompt_ids = np.asarray(answers.prompt_ids)
    _, right, images = sums_by_prompt(np.array([seen == asked for asked, seen in pairs], dtype=float), prompt_ids)
    _, unknown, _ = sums_by_prompt(np.array([seen is None for _, seen in pairs], dtype=float), prompt_ids)
    counted = images if unknown_is_wrong else images - unknown
    return estimate_ratio(right, counted, picks, unknown=int(unknown.sum()), limits=(0, 1))
