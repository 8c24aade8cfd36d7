"""How near a whole run comes to the speed of its slowest stage, by its recorded pieces of work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from storage.layout import Workspace
from storage.tables import read_rows

Span = tuple[float, float]


@dataclass(frozen=True)
class Throughput:
    """images: that were drawn. seconds: of the run, without the time between a stop and going on.

    stage: the one that was at work longest; busy_seconds: when at least one of its pieces was being made.
    """

    images: int
    seconds: float
    stage: str
    busy_seconds: float

    @property
    def share(self) -> float:
        """Of the speed that the run would have had if nothing but the slowest stage took any time."""
        return self.busy_seconds / self.seconds

    def describe(self) -> str:
        """For a table."""
        return f"{self.images / self.seconds:.3g} images/s, {100 * self.share:.0f}% of {self.stage}'s limit"


def run_throughput(place: Workspace, run_id: str) -> Throughput | None:
    """Of what a run has done so far; None where nothing is recorded with its time.

    A session lasts from a start of the run to the last piece before the next start. With several workers a stage's
    limit is that of all of them together, as they were.
    """
    rows = [row for row in read_rows(place, run_id, "timings") if row["ended_at"] and row["items"] > 0]
    starts = sorted(_seconds(row["started_at"]) for row in read_rows(place, run_id, "starts"))
    spans: dict[str, list[Span]] = {}
    for row in rows:
        end = _seconds(row["ended_at"])
        spans.setdefault(row["stage"], []).append((end - row["seconds"], end))
    sessions = _sessions(starts, [end for own in spans.values() for _, end in own])
    busy = {stage: sum(_overlap(_union(own), session) for session in sessions) for stage, own in spans.items()}
    total = sum(end - start for start, end in sessions)
    if not busy or total <= 0:
        return None
    slowest = max(busy, key=lambda stage: busy[stage])
    images = sum(row["items"] for row in rows if row["stage"] == "sampling")
    return Throughput(images, total, slowest, busy[slowest])


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _sessions(starts: Sequence[float], ends: Sequence[float]) -> list[Span]:
    sessions: list[Span] = []
    for start, following in pairwise([*starts, float("inf")]):
        mine = [end for end in ends if start <= end < following]
        if mine:
            sessions.append((start, max(mine)))
    return sessions


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same time in spans that do not overlap."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlap(spans: Sequence[Span], session: Span) -> float:
    return sum(max(0.0, min(end, session[1]) - max(start, session[0])) for start, end in spans)
