"""Any number of processes go through the same list of work: each piece is made once, and none is left."""

import multiprocessing
import time
from collections import Counter
from pathlib import Path

import pytest

from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.layout import STAGING, Workspace
from storage.leftovers import remove_leftovers
from storage.locks import claimed
from storage.tables import write_rows
from tasks.shards import claim_each
from tasks.versions import OtherVersion, code_version, require_same_version

PROCESSES = multiprocessing.get_context("fork")
COUNT = 12


@pytest.fixture
def pieces(tmp_path: Path) -> list[ArtifactRef]:
    place = Workspace.open(tmp_path)
    return [ArtifactRef(str(place.root), "night", "timings", f"piece-{number:02d}") for number in range(COUNT)]


def make(ref: ArtifactRef, device: str = "cpu") -> None:
    row = {"run_id": "night", "stage": "sampling", "key": ref.key, "seconds": 1.0, "items": 1, "device": device}
    with staged_artifact(ref) as folder:
        write_rows(folder, "timings", [row])


def work(pieces: list[ArtifactRef], made: Path) -> None:
    for ref in claim_each(pieces):
        time.sleep(0.02)
        make(ref)
        with made.open("a") as stream:
            stream.write(f"{ref.key}\n")


def test_each_piece_is_made_once(pieces: list[ArtifactRef], tmp_path: Path) -> None:
    made = tmp_path / "made.txt"
    workers = [PROCESSES.Process(target=work, args=(pieces, made)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert Counter(made.read_text().split()) == {ref.key: 1 for ref in pieces}
    assert not list((Workspace(Path(pieces[0].workspace)).run_folder("night") / STAGING).glob("*.claim"))


def test_a_dead_ones_claim_is_taken_over(pieces: list[ArtifactRef]) -> None:
    def die() -> None:
        for _ in claim_each(pieces):
            time.sleep(60)

    dying = PROCESSES.Process(target=die)
    dying.start()
    claim = Workspace(Path(pieces[0].workspace)).run_folder("night") / STAGING / f"timings.{pieces[0].key}.claim"
    deadline = time.monotonic() + 30
    while not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    seen: list[str] = []
    for ref in claim_each(pieces):
        if not seen:
            dying.kill()  # in the middle of its first piece, which this process passed over
            dying.join(30)
        make(ref)
        seen.append(ref.key)
    assert seen[0] != pieces[0].key
    assert sorted(seen) == [ref.key for ref in pieces]


def test_what_is_being_made_elsewhere_is_left_out(pieces: list[ArtifactRef]) -> None:
    with claimed(pieces[3]) as mine:
        assert mine
        for ref in claim_each(pieces):
            make(ref)
    assert [ref.key for ref in pieces if not is_committed(ref)] == [pieces[3].key]


def test_a_piece_that_its_maker_leaves_is_given_once(pieces: list[ArtifactRef]) -> None:
    assert len(list(claim_each(pieces))) == COUNT


def test_a_start_removes_claims_of_the_dead_alone(pieces: list[ArtifactRef]) -> None:
    place = Workspace(Path(pieces[0].workspace))
    staging = place.run_folder("night") / STAGING
    with claimed(pieces[0]):
        (staging / "timings.gone.claim").touch()
        remove_leftovers(place, "night")
        assert [path.name for path in staging.glob("*.claim")] == [f"timings.{pieces[0].key}.claim"]


def make_and_say(ref: ArtifactRef, made: Path) -> None:
    make(ref)
    with made.open("a") as stream:
        stream.write("made\n")


def test_two_writers_of_one_shard_do_no_harm(pieces: list[ArtifactRef], tmp_path: Path) -> None:
    """Where locks do not reach (a network disk), both make it; the second finds it committed."""
    made = tmp_path / "made.txt"
    writers = [PROCESSES.Process(target=make_and_say, args=(pieces[0], made)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    # No exit codes: a fork of a process that has run flows fails in Prefect's own clearing up, after all is done.
    assert made.read_text().split() == ["made"] * 4
    assert is_committed(pieces[0])


def commit_start(workspace: Path, popalign: str) -> None:
    ref = ArtifactRef(str(Workspace.open(workspace).root), "night", "starts", "20261126T000000.000000Z")
    row = {"run_id": "night", "started_at": "2026-11-26", "versions_json": f'{{"popalign": "{popalign}"}}'}
    with staged_artifact(ref) as folder:
        write_rows(folder, "starts", [row])


def test_a_worker_with_other_code_is_refused_by_name(tmp_path: Path) -> None:
    commit_start(tmp_path, "0.0.9+0123456789ab")
    with pytest.raises(OtherVersion, match=r"has popalign .*, and run 'night' was started by 0\.0\.9\+0123456789ab"):
        require_same_version(str(tmp_path), "night")


def test_the_same_code_goes_on(tmp_path: Path) -> None:
    commit_start(tmp_path, code_version())
    require_same_version(str(tmp_path), "night")
