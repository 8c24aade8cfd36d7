"""Every measure on an axis as rows: by prompt, by stratum of prompts, as the mean over prompts and pooled."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.disparity import MEASURES
from popalign_core.assessment.null_band import null_bands
from popalign_core.assessment.prompt_intervals import prompt_intervals
from popalign_core.assessment.resampling import DEFAULT_RESAMPLES
from popalign_core.assessment.uncertainty import DrawnCounts
from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed

Counted = Mapping[str, tuple[np.ndarray, int]]


@dataclass(frozen=True)
class DisparityRow:
    """One measured disparity. level: prompt, stratum (mean over its prompts), mean (over all prompts) or pooled.

    prompt_id: of level `prompt` only; stratum: of level `stratum` only. null_low, null_high: see `null_bands`.
    """

    level: str
    prompt_id: str | None
    axis: str
    measure: str
    target: str
    value: float
    low: float
    high: float
    floor: float | None
    n: int
    unknown: int
    stratum: str | None
    null_low: float
    null_high: float


def measure_disparities(
    counts_by_prompt: Counted,
    axis: Axis,
    target: np.ndarray | Mapping[str, np.ndarray],
    *,
    seed: int,
    name: str = "",
    strata: Mapping[str, str] | None = None,
    resamples: int = DEFAULT_RESAMPLES,
) -> list[DisparityRow]:
    """Every measure on every level; the same in any order of the prompts.

    counts_by_prompt: counts (groups,) and the number of unknown images. target: shares (groups,), or those of each
    prompt; prompts without any are left out. name: of the target; empty = uniform or given. strata: of each prompt;
    rows of the level `stratum` where there are two or more. Raises: InvalidInput.
    """
    prompt_ids = sorted(set(counts_by_prompt) & set(target) if isinstance(target, Mapping) else counts_by_prompt)
    if not prompt_ids:
        raise InvalidInput("no prompt to measure a disparity on.")
    shares = np.stack([target[prompt] for prompt in prompt_ids]) if isinstance(target, Mapping) else target
    even = shares.shape == (len(axis.groups),) and np.allclose(shares, axis.uniform())
    name = name or ("uniform" if even else "given")
    level = _Levels(counts_by_prompt, prompt_ids, shares, axis.name, seed, resamples)
    rows = [row for position in range(len(prompt_ids)) for row in level.of_prompt(position, name)]
    groups: dict[str, list[int]] = {}
    for position, prompt in enumerate(prompt_ids):
        if strata is not None:
            groups.setdefault(strata[prompt], []).append(position)
    for stratum in sorted(groups) if len(groups) > 1 else ():
        rows += level.of_stratum(stratum, groups[stratum], name)
    return [*rows, *level.of_all(name)]


@dataclass(frozen=True, eq=False)
class _Levels:
    counted: Counted
    prompt_ids: list[str]
    target: np.ndarray
    axis: str
    seed: int
    resamples: int

    def of_prompt(self, position: int, name: str) -> Iterator[DisparityRow]:
        prompt = self.prompt_ids[position]
        drawn = self._drawn([position], "disparity", prompt)
        return self._rows(drawn, "prompt", name, prompt_id=prompt)

    def of_stratum(self, stratum: str, positions: list[int], name: str) -> Iterator[DisparityRow]:
        return self._rows(self._drawn(positions, "stratum", stratum), "stratum", name, stratum=stratum)

    def of_all(self, name: str) -> Iterator[DisparityRow]:
        drawn = self._drawn(list(range(len(self.prompt_ids))), "disparities")
        yield from self._rows(drawn, "mean", name)
        yield from self._rows(drawn, "pooled", name)

    def _drawn(self, positions: list[int], kind: str, *names: str) -> DrawnCounts:
        own = [self.counted[self.prompt_ids[position]] for position in positions]
        parts = (kind, self.axis, *names)
        return DrawnCounts.of(
            np.stack([counts for counts, _ in own]),
            sum(unknown for _, unknown in own),
            self.target if self.target.ndim == 1 else self.target[positions],
            rng=np.random.default_rng(derive_seed(self.seed, *parts)),
            resamples=self.resamples,
        )

    def _ends_of_prompt(self, drawn: DrawnCounts, prompt_id: str) -> dict[str, tuple[float, float]]:
        if not len(drawn.counts):  # all of its images are unknown
            return {}
        rng = np.random.default_rng(derive_seed(self.seed, "prompt interval", self.axis, prompt_id))
        target = drawn.target if drawn.target.ndim == 1 else drawn.target[0]
        return prompt_intervals(drawn.counts[0], target, rng=rng, draws=self.resamples)

    def _rows(
        self, drawn: DrawnCounts, level: str, target: str, *, prompt_id: str | None = None, stratum: str | None = None
    ) -> Iterator[DisparityRow]:
        pooled = level in ("prompt", "pooled")
        bands = null_bands(drawn.counts.sum(axis=-1), drawn.target, pooled=pooled)
        ends = self._ends_of_prompt(drawn, prompt_id) if prompt_id is not None else {}
        for name, measure in MEASURES.items():
            e = (drawn.pooled(measure) if pooled else drawn.mean(measure)).estimate
            numbers = (e.value, *ends.get(name, (e.low, e.high)), e.floor, e.n, e.unknown)
            yield DisparityRow(level, prompt_id, self.axis, name, target, *numbers, stratum, *bands[name])
