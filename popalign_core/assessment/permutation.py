"""Whether a prompt's disparity changed: sides swapped at random, between the two images that share their noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.paired import holm, joint_counts
from popalign_core.attributes import Axis
from popalign_core.seeds import derive_seed

DEFAULT_PERMUTATIONS = 9_999
Labels = Mapping[str, Sequence[str | None]]


@dataclass(frozen=True)
class PromptChange:
    """The L2 discrepancy of a prompt before and after, or its mean over prompts (prompt_id None).

    n: pairs; changed: those whose group differs, unknown as one more. p_value: two-sided. p_holm and
    p_benjamini_hochberg: adjusted over the prompts of an axis; None for the mean. nan where a side has no known image.
    """

    axis: str
    prompt_id: str | None
    measure: str
    before: float
    after: float
    difference: float
    n: int
    changed: int
    p_value: float
    p_holm: float | None
    p_benjamini_hochberg: float | None


def prompt_changes(
    before: Labels, after: Labels, axis: Axis, *, seed: int, permutations: int = DEFAULT_PERMUTATIONS
) -> list[PromptChange]:
    """A row a prompt, and one of their mean.

    before, after: perceived groups (None = unknown) of a prompt's images by prompt, in the same order of their noise.
    Of a prompt: if the training did nothing to its images, which of two is the one before is as good as a coin. Of the
    mean: the same of prompts, by scipy's `permutation_test`, exact where they are few. Raises: InvalidInput,
    UnknownName.
    """
    joint = joint_counts(before, after, axis)
    prompts = sorted(before)
    sides = _discrepancies(joint, axis)
    p_values = [
        _swapped_p(own, axis, np.random.default_rng(derive_seed(seed, "swaps", axis.name, prompt)), permutations)
        for own, prompt in zip(joint, prompts, strict=True)
    ]
    adjusted = list(zip(p_values, holm(p_values), _false_discovery(p_values), strict=True))
    sizes = joint.sum(axis=(1, 2))
    changed = sizes - np.trace(joint, axis1=1, axis2=2)
    rows = [
        PromptChange(axis.name, prompt, "l2", *_both(sides[:, i]), int(sizes[i]), int(changed[i]), *adjusted[i])
        for i, prompt in enumerate(prompts)
    ]
    known = sides[:, ~np.isnan(sides).any(axis=0)]
    p = _mean_p(known, np.random.default_rng(derive_seed(seed, "swaps", axis.name)), permutations)
    mean = known.mean(axis=1) if known.size else np.full(2, np.nan)
    totals = int(sizes.sum()), int(changed.sum())
    return [*rows, PromptChange(axis.name, None, "l2", *_both(mean), *totals, p, None, None)]


def _both(sides: np.ndarray) -> tuple[float, float, float]:
    before, after = (float(side) for side in sides)
    return before, after, after - before


def _discrepancies(joint: np.ndarray, axis: Axis) -> np.ndarray:
    """(2, ...) of pairs by group before and after (..., groups + 1, groups + 1)."""
    before, after = joint[..., :-1, :].sum(axis=-1), joint[..., :, :-1].sum(axis=-2)
    return np.stack([l2_discrepancy(before, axis.uniform()), l2_discrepancy(after, axis.uniform())])


def _swapped_p(joint: np.ndarray, axis: Axis, rng: np.random.Generator, permutations: int) -> float:
    measured = np.subtract(*_discrepancies(joint, axis))
    if np.isnan(measured):
        return float("nan")
    # Of the pairs that go from group i to j or back, a binomial number goes one way once sides are swapped at random.
    either = np.triu(joint + joint.T, 1)
    there = rng.binomial(either, 0.5, size=(permutations, *joint.shape))
    swapped = there + np.swapaxes(either - there, -1, -2) + np.diag(np.diag(joint))
    drawn = np.abs(np.subtract(*_discrepancies(swapped, axis)))
    # Rounding must not keep what is equal from counting; a swap that empties a side has no number.
    reached = int((drawn >= abs(measured) - 1e-12).sum())
    return (reached + 1) / (permutations + 1)


def _mean_p(sides: np.ndarray, rng: np.random.Generator, permutations: int) -> float:
    if sides.shape[1] < 2:
        return float("nan")

    def difference(before: np.ndarray, after: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(after - before, axis=axis)

    found = stats.permutation_test(
        (sides[0], sides[1]),
        difference,
        permutation_type="samples",
        vectorized=True,
        n_resamples=permutations,
        rng=rng,
    )
    return float(found.pvalue)


def _false_discovery(p_values: Sequence[float]) -> list[float]:
    """Adjusted by Benjamini & Hochberg (1995); nan stays and counts as no test."""
    adjusted = np.array(p_values, dtype=float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = stats.false_discovery_control(adjusted[known])
    return adjusted.tolist()
