"""How much of a picture besides the person changed from the base to the aligned model, at the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.quality import estimate_score
from popalign_core.assessment.resampling import DEFAULT_RESAMPLES, Estimate
from popalign_core.detection import Box
from popalign_core.errors import InvalidInput

# Of a picture that is nearly all person, what is left says nothing.
LEAST_OUTSIDE = 0.1


def outside_change(base: np.ndarray, aligned: np.ndarray, boxes: Sequence[Box]) -> float:
    """Mean absolute difference of the pixels outside all boxes, 0 to 1; nan where they are under a tenth of the image.

    base, aligned: uint8 (h, w, 3). boxes: persons of either image. Raises: InvalidInput.
    """
    if base.shape != aligned.shape or base.ndim != 3:
        raise InvalidInput(f"two pictures of one size are needed, got {base.shape} and {aligned.shape}.")
    outside = np.ones(base.shape[:2], dtype=bool)
    for box in boxes:
        outside[max(box.top, 0) : box.bottom, max(box.left, 0) : box.right] = False
    if outside.mean() < LEAST_OUTSIDE:
        return float("nan")
    difference = np.abs(base[outside].astype(np.int16) - aligned[outside].astype(np.int16))
    return float(difference.mean() / 255)


@dataclass(frozen=True)
class Entanglement:
    """changed: of pairs whose perceived group differs, else of those whose group is the same. None: no such pair.

    left_out: pairs without a group on a side, without a person in both, or that are nearly all person.
    """

    axis: str
    changed: bool
    estimate: Estimate | None
    left_out: int


def entanglement(
    axis: str,
    values: np.ndarray,
    before: Sequence[str | None],
    after: Sequence[str | None],
    prompt_ids: Sequence[str],
    *,
    rng: np.random.Generator,
    resamples: int = DEFAULT_RESAMPLES,
) -> list[Entanglement]:
    """Means of `outside_change` with intervals over prompts: where the group changed, and where it did not.

    If the surroundings change more where the group did, the model has tied them to it. values: (pairs,), nan = none.
    """
    usable = np.array([a is not None and b is not None for a, b in zip(before, after, strict=True)], bool)
    usable &= ~np.isnan(values)
    differ = np.array([a != b for a, b in zip(before, after, strict=True)], bool)
    found: list[Entanglement] = []
    for changed in (True, False):
        wanted = usable & (differ == changed)
        ids = [prompt for prompt, taken in zip(prompt_ids, wanted, strict=True) if taken]
        estimate = estimate_score(values[wanted], ids, rng=rng, resamples=resamples) if ids else None
        found.append(Entanglement(axis, changed, estimate, int((~usable).sum())))
    return found
