"""How near a run came to its slowest stage, of made-up timings, is what they come to by hand."""

import pytest

from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.summary import run_states
from tasks.throughput import run_throughput


@pytest.fixture
def place(tmp_path) -> Workspace:
    return Workspace.open(tmp_path / "workspace")


def commit(place: Workspace, table: str, key: str, row: dict) -> None:
    with staged_artifact(ArtifactRef(str(place.root), "night", table, key)) as folder:
        write_rows(folder, table, [{"run_id": "night"} | row])


def start(place: Workspace, at: str) -> None:
    commit(place, "starts", at.replace(":", ""), {"started_at": f"2026-01-01T{at}+00:00", "versions_json": "{}"})


def piece(place: Workspace, stage: str, ended: str, seconds: float, items: int = 10) -> None:
    row = {"stage": stage, "key": f"{stage}/{ended}", "seconds": seconds, "items": items, "device": "cpu"}
    commit(place, "timings", f"{stage}-{ended}".replace(":", ""), row | {"ended_at": f"2026-01-01T{ended}+00:00"})


def test_pauses_between_starts_do_not_count_and_workers_share_their_time(place):
    start(place, "00:00:00")
    # Two workers: 40 s and 30 s that overlap, so 45 s; then 5 s of classification. Ten seconds of start before them.
    piece(place, "sampling", "00:00:50", 40)
    piece(place, "sampling", "00:00:55", 30)
    piece(place, "classification", "00:01:00", 5)
    # Killed; an hour later it goes on, with 20 s of sampling in 40 s.
    start(place, "01:00:00")
    piece(place, "sampling", "01:00:40", 20)
    speed = run_throughput(place, "night")
    assert speed is not None
    assert (speed.images, speed.stage) == (30, "sampling")
    assert (speed.seconds, speed.busy_seconds) == (100.0, 65.0)
    assert speed.describe() == "0.3 images/s, 65% of sampling's limit"
    assert run_states(place) == [("night", "0", "0", "0.3 images/s, 65% of sampling's limit", "not finished")]


def test_the_slowest_stage_may_be_another(place):
    start(place, "00:00:00")
    piece(place, "sampling", "00:00:10", 5)
    piece(place, "alignment", "00:01:40", 90, items=3)
    speed = run_throughput(place, "night")
    assert speed is not None
    assert speed.describe() == "0.1 images/s, 90% of alignment's limit"


def test_timings_of_before_say_nothing(place):
    start(place, "00:00:00")
    row = {"stage": "sampling", "key": "k", "seconds": 5.0, "items": 10, "device": "cpu", "ended_at": None}
    commit(place, "timings", "k", row)
    assert run_throughput(place, "night") is None
    assert run_states(place) == [("night", "0", "0", "", "not finished")]
