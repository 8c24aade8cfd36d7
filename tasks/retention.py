"""What `popalign gc` shows and does: old runs of a workspace, by age and by decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

from popalign_core.errors import InvalidInput, UnknownName
from storage.layout import Workspace
from storage.registry import protected_models
from storage.removal import remove
from storage.retention import Choice, Decision, OldRun, What, removable

ANY = "any"
DECISIONS: tuple[Decision, ...] = get_args(Decision)
KINDS: tuple[What, ...] = get_args(What)


@dataclass(frozen=True)
class Collected:
    """rows: (run, decision, age, what, size), ready to show. problems: one sentence a run that keeps everything.

    bytes: that were removed, or would be.
    """

    rows: tuple[tuple[str, str, str, str, str], ...]
    problems: tuple[str, ...]
    bytes: int
    conclusion: str

    @property
    def total(self) -> str:
        """All sizes together."""
        return _size(self.bytes)


def gc_choice(older_than_days: float, decisions: Sequence[str], what: Sequence[str]) -> Choice:
    """The choice of a command line. decisions: none named = hold and none; "any" = all. what: none named = the usual.

    Raises: UnknownName, InvalidInput.
    """
    if older_than_days < 0:
        raise InvalidInput(f"--older-than {older_than_days:g} is below 0: give an age in days.")
    for kind, got, known in (("--decision", decisions, (ANY, *DECISIONS)), ("--what", what, KINDS)):
        for name in got:
            if name not in known:
                raise UnknownName(kind=kind, got=name, known=known)
    named = DECISIONS if ANY in decisions else cast("Sequence[Decision]", decisions) or ("hold", "none")
    return Choice(older_than_days, frozenset(named), frozenset(cast("Sequence[What]", what)) or None)


def collect_garbage(workspace: str, choice: Choice, *, yes: bool) -> Collected:
    """Lists what the choice takes, and removes it with `yes`; the models in the registry stay.

    Raises: StorageFull where not even a record of a removal can be written.
    """
    place = Workspace.open(workspace)
    if yes:
        runs = remove(place, choice, lambda: protected_models(place))
    else:
        runs = removable(place, choice, protected_models(place))
    rows = tuple(row for run in runs for row in _rows(run))
    problems = tuple(f"{run.run_id} stays as it is: {run.problem}" for run in runs if run.problem)
    size = sum(part.bytes for run in runs for part in run.parts)
    if not rows:
        conclusion = f"nothing to remove in {place.root}"
    elif yes:
        conclusion = f"{_size(size)} removed; tables, reports and promoted models are as they were"
    else:
        conclusion = f"nothing was touched: the same with --yes removes these {_size(size)}"
    return Collected(rows, problems, size, conclusion)


def _rows(run: OldRun) -> list[tuple[str, str, str, str, str]]:
    rows: list[tuple[str, str, str, str, str]] = []
    for kind in KINDS:
        parts = [part for part in run.parts if part.what == kind]
        if parts:
            of = {"images": "shards", "weights": "models"}.get(kind, "")
            what = f"{kind} of {len(parts)} {of if len(parts) > 1 else of[:-1]}" if of else kind
            size = sum(part.bytes for part in parts)
            decision = "not finished" if run.decision == "none" else run.decision
            rows.append((run.run_id, decision, f"{run.age_days:.1f} days", what, _size(size)))
    return rows


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
