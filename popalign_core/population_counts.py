"""Labelled samples, the plan of a population, and how one is counted against its target."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.attributes import CROSSING, Axis, cross_axes
from popalign_core.errors import InvalidInput
from popalign_core.preferences import PairWeighting, excess_discrepancy


@dataclass(frozen=True)
class LabelledSample:
    """A sample and its perceived cell: a group for every axis in their order, None where the status is not `ok`.

    prompt_id: of the prompt it was drawn for. index: with the family it decides the initial noise.
    """

    sample_id: str
    prompt_id: str
    index: int
    cell: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class PopulationPlan:
    """How populations are to be built. size: samples a side, at least 1.

    target: shares of the crossed cells in the order of `cross_axes`, sum 1; None = the same for all. axis_scales: what
    is left on every measured axis, 0 to 1, for the weighting "axis"; None = 1 each.
    Raises: InvalidInput.
    """

    axes: tuple[Axis, ...]
    size: int
    seed: int
    weighting: PairWeighting
    target: np.ndarray | None = None
    axis_scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        cells = len(cross_axes(self.axes).groups)
        if self.size < 1:
            raise InvalidInput(f"populations.size is {self.size}, expected at least 1.")
        if self.target is None:
            return
        if self.target.shape != (cells,) or not (self.target >= 0).all() or abs(self.target.sum() - 1) > 1e-6:
            raise InvalidInput(f"the target needs {cells} shares of at least 0 that sum to 1, got {self.target!r}.")

    @property
    def measured_axes(self) -> tuple[Axis, ...]:
        """The axes, and the crossed one last; one axis alone is its own crossing."""
        return self.axes if len(self.axes) == 1 else (*self.axes, cross_axes(self.axes))

    def targets(self) -> list[np.ndarray]:
        """The target of every measured axis: marginals of the crossed one."""
        crossed = cross_axes(self.axes).uniform() if self.target is None else self.target
        table = crossed.reshape([len(axis.groups) for axis in self.axes])
        every = range(len(self.axes))
        marginals = [table.sum(axis=tuple(other for other in every if other != axis)) for axis in every]
        return marginals if len(self.axes) == 1 else [*marginals, crossed]


@dataclass(frozen=True)
class GroupCounts:
    """One side on one axis.

    counts, target: one for every group, the target in shares; discrepancy: L2 to it, nan where all are unknown.
    """

    axis: Axis
    counts: tuple[int, ...]
    target: tuple[float, ...]
    unknown: int
    discrepancy: float


@dataclass(frozen=True)
class Side:
    """The samples of one population, in the order of the pairs, and their counts on the measured axes, crossed last."""

    samples: tuple[LabelledSample, ...]
    counts: tuple[GroupCounts, ...]


def by_prompt(samples: Iterable[LabelledSample]) -> dict[str, list[LabelledSample]]:
    """The samples of each prompt that has any, in their order."""
    found: dict[str, list[LabelledSample]] = {}
    for sample in samples:
        found.setdefault(sample.prompt_id, []).append(sample)
    return found


def group_counts(labels: Iterable[str | None], axis: Axis) -> tuple[np.ndarray, int]:
    """Samples of every group, (groups,) int64, zeros included, and how many are unknown. Raises: UnknownName."""
    codes = np.array([-1 if label is None else axis.index(label) for label in labels], dtype=np.int64)
    known = codes[codes >= 0]
    return np.bincount(known, minlength=len(axis.groups)), len(codes) - len(known)


def count_side(samples: Sequence[LabelledSample], plan: PopulationPlan) -> Side:
    """The samples with their counts and distances to the plan's targets."""
    counts: list[GroupCounts] = []
    for position, (axis, target) in enumerate(zip(plan.measured_axes, plan.targets(), strict=True)):
        found, unknown = group_counts(_labels(samples, position), axis)
        distance = float(np.linalg.norm(found / found.sum() - target)) if found.any() else float("nan")
        counts.append(GroupCounts(axis, tuple(found.tolist()), tuple(target.tolist()), unknown, distance))
    return Side(tuple(samples), tuple(counts))


def axis_excess(populations: Sequence[Sequence[LabelledSample]], plans: Sequence[PopulationPlan]) -> tuple[float, ...]:
    """What is left on every measured axis: the excess discrepancy of a model's own populations, averaged over prompts.

    plans: one a population, with the targets to measure from. Over all prompts together, because a dozen images of one
    prompt cannot tell a small lean from chance.
    """
    sides = [count_side(samples, plan) for samples, plan in zip(populations, plans, strict=True)]
    targets = [plan.targets() for plan in plans]
    return tuple(
        excess_discrepancy(
            np.array([side.counts[place].counts for side in sides]), np.stack([target[place] for target in targets])
        )
        for place in range(len(targets[0]))
    )


def group_positions(samples: Sequence[LabelledSample], plan: PopulationPlan) -> np.ndarray:
    """(samples, measured axes) positions of the perceived groups, -1 where unknown."""
    columns = [
        [-1 if label is None else axis.index(label) for label in _labels(samples, position)]
        for position, axis in enumerate(plan.measured_axes)
    ]
    return np.array(columns, dtype=np.int64).T


def _labels(samples: Sequence[LabelledSample], position: int) -> list[str | None]:
    """Labels on the measured axis at a position; a cell with an unknown part is unknown on the crossed axis."""
    return [crossed_label(sample.cell) if position >= len(sample.cell) else sample.cell[position] for sample in samples]


def crossed_label(cell: tuple[str | None, ...]) -> str | None:
    """The group of the crossed axis; unknown where a part is."""
    known = [group for group in cell if group is not None]
    return CROSSING.join(known) if len(known) == len(cell) else None
