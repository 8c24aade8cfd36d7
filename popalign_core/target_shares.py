"""Targets beside the uniform one: shares that a user states, or that labour statistics give for an occupation.

A CSV file with the columns axis, group and share, and if wanted subject, source and year: a row a group. Rows with a
subject hold for its prompts (blind to case, plural and listed synonyms), those without one for all others. Every group
of the axis has a row, and the shares of an axis and subject sum to 1.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from math import isclose, isfinite
from pathlib import Path

import numpy as np

from popalign_core.attributes import Axis, axis_named
from popalign_core.errors import InvalidInput
from popalign_core.subjects import subject_key

UNIFORM = "uniform"
SHIPPED = {"us-cps-2022": "us_cps_2022.csv"}
_NEEDED, _FURTHER = ("axis", "group", "share"), ("subject", "source", "year")


class TargetNotUsable(InvalidInput):
    """A file of target shares is missing, or says something that cannot be."""


@dataclass(frozen=True)
class TargetShare:
    """One row. subject: as written, None = of all subjects without rows of their own."""

    axis: str
    subject: str | None
    group: str
    share: float
    source: str
    year: str


@dataclass(frozen=True)
class Target:
    """A named target distribution."""

    name: str
    rows: tuple[TargetShare, ...]

    def shares(self, axis: Axis, subjects: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Shares (groups,) of every prompt that the target says something of. subjects: by prompt id."""
        known: dict[str | None, dict[str, float]] = {}
        for row in self.rows:
            if row.axis == axis.name:
                known.setdefault(_key(row.subject), {})[row.group] = row.share
        found: dict[str, np.ndarray] = {}
        for prompt, subject in subjects.items():
            own = known.get(subject_key(subject), known.get(None))
            if own is not None:
                shares = np.array([own[group] for group in axis.groups])
                # Figures with three decimals sum to 1 only nearly.
                found[prompt] = shares / shares.sum()
        return found


def load_targets(names: Sequence[str]) -> list[Target]:
    """Shipped targets by name, others from CSV files, whose stems are their names. Raises: TargetNotUsable."""
    targets = [_shipped(name) if name in SHIPPED else _from_file(Path(name)) for name in names]
    if len({target.name for target in targets} | {UNIFORM}) <= len(targets):
        raise TargetNotUsable(
            f"targets need different names, and none may be {UNIFORM!r}, which is always measured: {', '.join(names)}."
        )
    return targets


def _shipped(name: str) -> Target:
    text = (resources.files("popalign_core") / "target_files" / SHIPPED[name]).read_text(encoding="utf-8")
    return Target(name, _parsed(text, name))


def _from_file(path: Path) -> Target:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TargetNotUsable(
            f"target {str(path)!r} is none that is shipped ({', '.join(SHIPPED)}), and no readable CSV file: {error}."
        ) from error
    return Target(path.stem, _parsed(text, str(path)))


def _parsed(text: str, where: str) -> tuple[TargetShare, ...]:
    reader = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    columns = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = columns
    if missing := [name for name in _NEEDED if name not in columns]:
        raise TargetNotUsable(
            f"{where} lacks the column {missing[0]!r}: it needs {', '.join(_NEEDED)}, and may have "
            f"{', '.join(_FURTHER)}; got {', '.join(columns) or 'nothing'}."
        )
    rows = tuple(_row({key: (value or "").strip() for key, value in row.items()}, where) for row in reader)
    if not rows:
        raise TargetNotUsable(f"{where} has no share: write one a line.")
    _check(rows, where)
    return rows


def _row(cells: Mapping[str, str], where: str) -> TargetShare:
    axis = axis_named(cells["axis"])
    axis.index(cells["group"])
    try:
        share = float(cells["share"])
    except ValueError:
        share = float("nan")
    if not (isfinite(share) and 0 <= share <= 1):
        raise TargetNotUsable(
            f"{where}: share {cells['share']!r} of {axis.name} = {cells['group']!r} is not between 0 and 1."
        )
    return TargetShare(
        axis.name,
        cells.get("subject") or None,
        cells["group"],
        share,
        cells.get("source", ""),
        cells.get("year", ""),
    )


def _check(rows: Sequence[TargetShare], where: str) -> None:
    together: dict[tuple[str, str | None], list[TargetShare]] = {}
    for row in rows:
        together.setdefault((row.axis, _key(row.subject)), []).append(row)
    for (name, _), own in together.items():
        what = f"{where}: {name}" + (f" of {own[0].subject!r}" if own[0].subject else "")
        groups = axis_named(name).groups
        if sorted(row.group for row in own) != sorted(groups):
            got = ", ".join(row.group for row in own)
            raise TargetNotUsable(f"{what} needs each of its groups once ({', '.join(groups)}), got {got}.")
        total = sum(row.share for row in own)
        if not isclose(total, 1, abs_tol=0.005):
            raise TargetNotUsable(f"{what}: its shares sum to {total:g}, expected 1.")


def _key(subject: str | None) -> str | None:
    return None if subject is None else subject_key(subject)
