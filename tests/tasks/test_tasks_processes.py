"""What starts and ends a training's processes, and brings their errors; no model is loaded."""

import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from living_processes import set_temporary_folder, training_pids, wait_until

from popalign_core.alignment.processes import Processes
from popalign_core.errors import InvalidInput, LostProcess, TrainingDiverged, UnknownName
from storage.errors import StorageFull
from tasks.training_errors import from_text, read_failure, same_outcome, to_text
from tasks.training_processes import Report, TrainingProcesses, run_processes
from tasks.training_rank import local_device

TWO = TrainingProcesses(per_host=2)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_temporary_folder(tmp_path / "temporary", monkeypatch)


@pytest.fixture
def light_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("light_ranks")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(own_temporary_folder: Path, number: signal.Signals) -> None:
    """Ranks that do not heed SIGTERM, and a parent that is given no time to end them."""
    start = (
        "from tasks.training_processes import Report, TrainingProcesses, run_processes;"
        "run_processes('light_rank', 'wait', 'waiting', TrainingProcesses(2), Report(print, print))"
    )
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=Path(__file__).parents[2])
    wait_until(lambda: len(list(own_temporary_folder.glob("*/waiting.*"))) == 2)
    assert len(training_pids(own_temporary_folder)) == 3
    parent.send_signal(number)
    assert parent.wait(30) == -number
    wait_until(lambda: training_pids(own_temporary_folder) == {}, seconds=10)


@pytest.mark.usefixtures("light_ranks")
def test_what_fails_in_one_process_fails_in_all_of_them(own_temporary_folder: Path) -> None:
    advanced: list[int] = []
    said: list[str] = []
    with pytest.raises(StorageFull, match="rank 0 heard: the disk of rank 1 is full"):
        run_processes("light_rank", "fail", "failing", TWO, Report(advanced.append, said.append))
    assert said == ["joined"]
    assert sum(advanced) == 3
    assert training_pids(own_temporary_folder) == {}


@pytest.mark.parametrize(
    "error",
    [
        InvalidInput("not usable"),
        TrainingDiverged(step=3, loss=float("nan")),
        UnknownName(kind="axis", got="x", known=["y"]),
        LostProcess("gone"),
        StorageFull("full"),
        PermissionError(13, "Permission denied"),
        ValueError("of Python"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_stays_the_same_on_its_way(error: Exception) -> None:
    again = from_text(to_text(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert str(pickle.loads(pickle.dumps(again))) == str(error)


def test_an_error_that_cannot_be_built_again_keeps_its_name_and_traceback() -> None:
    for error in (torch.OutOfMemoryError("no room"), UnicodeDecodeError("utf-8", b"x", 0, 1, "why")):
        try:
            raise error
        except (RuntimeError, UnicodeDecodeError) as raised:
            again = from_text(to_text(raised))
        assert type(again) is RuntimeError
        assert str(again).startswith(f"{type(error).__name__}: ")
        assert "in test_an_error_that_cannot_be_built_again" in again.__notes__[0]


def test_a_cause_counts_before_what_others_saw_of_it(tmp_path: Path) -> None:
    def failure(*, exits: str = "[]", code: int = 1, **errors: Exception) -> Exception:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "lost.json").write_text(f'{{"exits": {exits}}}')
        for rank, error in errors.items():
            (folder / f"error.{rank[1:]}.json").write_text(to_text(error))
        return read_failure(folder, code, "line\nlast line")

    assert isinstance(failure(r0=LostProcess("x"), r1=StorageFull("full")), StorageFull)
    assert "process 1 was ended by SIGKILL" in str(failure(exits="[[0, 1], [1, -9]]", r0=LostProcess("x")))
    assert str(failure(exits="[[0, 1], [1, -15]]", r0=LostProcess("of another host"))) == "of another host"
    assert "process 0 was ended by SIGTERM" in str(failure(exits="[[0, -15], [1, -15]]"))
    assert "launcher of the training processes was ended by SIGKILL" in str(failure(code=-9))
    silent = failure(exits="[[0, 3]]", code=1)
    assert (type(silent), silent.__notes__[0][-9:]) == (RuntimeError, "last line")


def test_one_process_keeps_its_own_error() -> None:
    error = StorageFull("full")
    with pytest.raises(StorageFull) as caught, same_outcome(Processes()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_host": 0}, "one or more"),
        ({"hosts": 2}, "needs a rendezvous"),
        ({"rendezvous": "host"}, "expected host:port"),
    ],
)
def test_impossible_processes_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TrainingProcesses(**given)


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_device("cpu", 1, 2) == "cpu"
    monkeypatch.setattr("popalign_core.models.sdxl.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [local_device("cuda", rank, 2) for rank in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(InvalidInput, match="3 training processes on this host, which has 2 GPUs"):
        local_device("cuda", 0, 3)
    for name in ("cuda:1", "mps"):
        with pytest.raises(InvalidInput, match="needs cuda or cpu"):
            local_device(name, 0, 2)
