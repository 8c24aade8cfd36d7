"""What a report is made from: rows shaped like the tables of docs/tables.md, image bytes, the configuration."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from popalign_core.errors import InvalidInput

Row = Mapping[str, Any]


def _no_rows() -> Sequence[Row]:
    return ()


@dataclass(frozen=True)
class ContactSheet:
    """The same seeds before and after, one sheet each as `contact_sheet` draws them: rows = prompts, columns = samples.

    before, after: WebP or PNG bytes, None where that model has not been sampled. row_labels: one a row of the sheet.
    before_perceived, after_perceived: what is perceived in every picture, in the same rows and columns, as
    `perceived_text` says it; empty where a cell is. Without them nothing is said of single pictures.
    """

    title: str
    before: bytes | None
    after: bytes | None
    row_labels: Sequence[str]
    before_perceived: Sequence[Sequence[str]] = ()
    after_perceived: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A run as far as it got: whatever has no rows yet is shown as not finished.

    created: any text that tells when. yields: how many identity-specific samples could be used, rows of (round, group,
    drawn, kept). failure: what stopped the run, one sentence. measure: the disparity of the headline and the charts.
    All other rows are those of the table of the name; rows of other models or judges are passed over. Disparities may
    also have the columns `suite` and `kind`: suites are then told apart, and only neutral prompts are shown.
    """

    run_id: str
    created: str
    config: Mapping[str, Any]
    versions: Mapping[str, Any]
    base_model_id: str
    model_id: str
    judge_id: str
    builder_id: str
    prompts: Sequence[Row] = field(default_factory=_no_rows)
    disparities: Sequence[Row] = field(default_factory=_no_rows)
    comparisons: Sequence[Row] = field(default_factory=_no_rows)
    group_shares: Sequence[Row] = field(default_factory=_no_rows)
    scores: Sequence[Row] = field(default_factory=_no_rows)
    group_scores: Sequence[Row] = field(default_factory=_no_rows)
    group_diversities: Sequence[Row] = field(default_factory=_no_rows)
    group_gaps: Sequence[Row] = field(default_factory=_no_rows)
    distances: Sequence[Row] = field(default_factory=_no_rows)
    group_distances: Sequence[Row] = field(default_factory=_no_rows)
    entanglements: Sequence[Row] = field(default_factory=_no_rows)
    extensions: Sequence[Row] = field(default_factory=_no_rows)
    agreements: Sequence[Row] = field(default_factory=_no_rows)
    status_counts: Sequence[Row] = field(default_factory=_no_rows)
    populations: Sequence[Row] = field(default_factory=_no_rows)
    refusals: Sequence[Row] = field(default_factory=_no_rows)
    yields: Sequence[Row] = field(default_factory=_no_rows)
    training_steps: Sequence[Row] = field(default_factory=_no_rows)
    validations: Sequence[Row] = field(default_factory=_no_rows)
    models: Sequence[Row] = field(default_factory=_no_rows)
    seeds: Sequence[Row] = field(default_factory=_no_rows)
    seed_summaries: Sequence[Row] = field(default_factory=_no_rows)
    timings: Sequence[Row] = field(default_factory=_no_rows)
    sampler_differences: Sequence[Row] = field(default_factory=_no_rows)
    votes: Sequence[Row] = field(default_factory=_no_rows)
    corrected_shares: Sequence[Row] = field(default_factory=_no_rows)
    confusion_matrices: Sequence[Row] = field(default_factory=_no_rows)
    decision: Row | None = None
    sheets: Sequence[ContactSheet] = ()
    failure: str = ""
    measure: str = "l2"

    def __post_init__(self) -> None:
        if self.base_model_id == self.model_id:
            raise InvalidInput(f"before and after are the same model {self.model_id!r}: there is nothing to compare.")


@dataclass(frozen=True)
class Measured:
    """A number with what is known about it. n: images that have a label; unknown: images that have none.

    null_low, null_high: between what 95% of populations on target would show with so many images.
    """

    value: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    n: int | None = None
    unknown: int | None = None
    null_low: float | None = None
    null_high: float | None = None

    @property
    def unknown_share(self) -> float | None:
        """Share of all images that have no label."""
        if self.n is None or self.unknown is None or self.n + self.unknown == 0:
            return None
        return self.unknown / (self.n + self.unknown)

    @property
    def images(self) -> int | None:
        """All images, with a label or without."""
        return None if self.n is None else self.n + (self.unknown or 0)


@dataclass(frozen=True)
class Change:
    """The same thing measured on both models; None where it was not."""

    before: Measured | None
    after: Measured | None


def measured(row: Row | None, value: str = "value", low: str = "low", high: str = "high") -> Measured | None:
    """The number of a row, from the columns of these names; None if there is no row, or no number in it."""
    if row is None:
        return None
    number = _number(row.get(value))
    if number is None:
        return None
    return Measured(
        value=number,
        low=_number(row.get(low)),
        high=_number(row.get(high)),
        floor=_number(row.get("floor")),
        n=row.get("n"),
        unknown=row.get("unknown"),
        null_low=_number(row.get("null_low")),
        null_high=_number(row.get("null_high")),
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def matching(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Rows with these values; an absent column counts as None."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def paired(
    rows: Iterable[Row], keys: Sequence[str], data: ReportData
) -> dict[tuple[Hashable, ...], tuple[Row | None, Row | None]]:
    """(before, after) rows of the run's two models under each combination of the key columns, as they appear."""
    found: dict[tuple[Hashable, ...], list[Row | None]] = {}
    sides = {data.base_model_id: 0, data.model_id: 1}
    for row in rows:
        side = sides.get(row["model_id"])
        if side is not None:
            found.setdefault(tuple(row.get(key) for key in keys), [None, None])[side] = row
    return {key: (before, after) for key, (before, after) in found.items()}
