"""A round in several processes: the same model, and nothing left of it, whatever ends it."""

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefect.logging import disable_run_logger
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from popalign_core.alignment.processes import Processes
from popalign_core.alignment.trainer import StepRecord
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import InvalidInput, LostProcess, TrainingDiverged, UnknownName
from popalign_core.models import emoji
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef, committed_keys, read_manifest
from storage.checkpoints import latest_checkpoint
from storage.commit import staged_artifact
from storage.errors import StorageFull
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks import alignment
from tasks.alignment import align_round
from tasks.run import BASE, reference
from tasks.training_checkpoints import RECORDS
from tasks.training_errors import from_text, read_failure, same_outcome, to_text
from tasks.training_processes import ONE, Report, TrainingProcesses, run_processes
from tasks.training_rank import local_device

RUN = "shared"
PAIRS, STEPS = 5, 12
TWO = TrainingProcesses(per_host=2)
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
BASE_UNET = Path(emoji.__file__).parent / "pipeline" / UNET
# Rounding. The mean squared errors, below 1, are off by some 100 roundings of 2^-24 that have passed the layers; the
# slope of the loss by them is at most beta = 500, over 3 pairs: 500 * 100 * 2^-24 = 3e-3 if all were off the same way,
# a tenth of it without a common sign.
LOSS_TOLERANCE = 3e-4
NORM_TOLERANCE = 3e-3
MARK = 123.0


def configuration(**alignment_settings: object) -> RunConfig:
    """Three pairs a step, so that two processes have shares of different sizes."""
    settings = {"steps": STEPS, "pairs_per_step": 3, "checkpoint_steps": 4, "preserve_weight": 0}
    settings |= {"learning_rate": 1e-5, "learning_rate_schedule": "constant"} | alignment_settings
    return with_settings(preset("emoji"), {f"alignment.{name}": str(value) for name, value in settings.items()})


def commit_preferences(root: Path) -> ArtifactRef:
    """Images of noise, in pairs under two captions."""
    pictures = np.random.default_rng(0).integers(0, 256, (2 * PAIRS, 64, 64, 3), dtype=np.uint8)
    images = [{"sample_id": f"s{n}", "image": encode_image(p), "format": FORMAT} for n, p in enumerate(pictures)]
    with staged_artifact(reference(str(root), RUN, "samples", "base.round-1.00000")) as folder:
        write_rows(folder, "images", images)
    pairs = [
        {
            "run_id": RUN,
            "round": 1,
            "pair_id": f"p/{n}",
            "population_id": "p",
            "prompt_id": "prompt",
            "caption": f"a photo of a {('judge', 'nurse')[n % 2]}",
            "winner_sample_id": f"s{n}",
            "loser_sample_id": f"s{n + PAIRS}",
            "weight": 1.0,
        }
        for n in range(PAIRS)
    ]
    ref = reference(str(root), RUN, "populations", "round-1")
    with staged_artifact(ref) as folder:
        write_rows(folder, "preferences", pairs)
    return ref


def aligned(preferences: ArtifactRef, config: RunConfig, processes: TrainingProcesses = ONE) -> ArtifactRef:
    with disable_run_logger():
        return align_round.fn(preferences, config, BASE, 1, processes)


def training_pids(folder: Path) -> dict[int, str]:
    """Living launchers and ranks whose folder lies in the given one, and the rank of each ("" for a launcher)."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
            variables = (entry / "environ").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if "-m" in command and any(part.startswith(str(folder)) for part in command):
            values = dict(variable.partition("=")[::2] for variable in variables)
            found[int(entry.name)] = values.get("RANK", "")
    return found


def listening_addresses(pid: int) -> list[str]:
    """Addresses, as hexadecimal, that a process accepts TCP connections at."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").open()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]


def wait_until(condition: Any, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """By which the processes of a test are known."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return aligned(commit_preferences(tmp_path_factory.mktemp("one")), configuration())


def compare(got: ArtifactRef, expected: ArtifactRef, *, marked: bool = False) -> None:
    """The same steps and weights up to rounding; the first step's record is from the checkpoint that was marked."""
    rows, wanted = read_artifact(got, "training_steps"), read_artifact(expected, "training_steps")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert (rows[0]["loss"] == MARK) is marked
    for one, two in list(zip(wanted, rows, strict=True))[1 if marked else 0 :]:
        assert two["loss"] == pytest.approx(one["loss"], abs=LOSS_TOLERANCE)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=NORM_TOLERANCE)
        assert two["implicit_accuracy"] == pytest.approx(one["implicit_accuracy"], abs=1e-6)
        assert two["pairs"] == 3
    base, one, two = load_file(BASE_UNET), load_file(expected.folder / UNET), load_file(got.folder / UNET)
    moved = sum(float((one[name] - base[name].float()).square().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert 0 < moved
    # Adam divides a gradient by its own size: where one is little more than rounding, so is its sign.
    assert apart < 0.02**2 * moved


def mark_checkpoint(root: Path) -> None:
    """Gives the record of the first step a loss that no step would have."""
    folder = latest_checkpoint(Workspace(root), RUN, "round-1")
    assert folder is not None
    records = (folder / RECORDS).read_text()
    first, rest = records.split("}", maxsplit=1)
    before, after = first.split('"loss": ')
    (folder / RECORDS).write_text(f'{before}"loss": {MARK}, {after.partition(", ")[2]}}}{rest}')


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_ends_all_and_any_number_goes_on(
    tmp_path: Path, own_temporary_folder: Path, in_one_process: ArtifactRef
) -> None:
    root = tmp_path / "workspace"
    preferences = commit_preferences(root)
    seen: list[str] = []

    def kill_second_rank() -> None:
        wait_until(lambda: latest_checkpoint(Workspace(root), RUN, "round-1"))
        pids = training_pids(own_temporary_folder)
        assert sorted(pids.values()) == ["", "0", "1"]
        seen.extend(address for pid in pids for address in listening_addresses(pid))
        os.kill(next(pid for pid, rank in pids.items() if rank == "1"), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_second_rank)
        with pytest.raises(LostProcess, match="training process 1 was ended by SIGKILL.*last checkpoint"):
            aligned(preferences, configuration(), TWO)
        killer.result()
    assert training_pids(own_temporary_folder) == {}
    assert list(own_temporary_folder.iterdir()) == []
    assert seen
    assert set(seen) == {"0100007F"}, "nothing listens beyond 127.0.0.1"
    assert committed_keys(Workspace(root), RUN, "models") == []
    assert committed_keys(Workspace(root), RUN, "timings") == []

    mark_checkpoint(root)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    by_one = aligned(replace(preferences, workspace=str(copy)), configuration())
    compare(by_one, in_one_process, marked=True)
    by_two = aligned(preferences, configuration(), TWO)
    compare(by_two, in_one_process, marked=True)
    assert read_manifest(by_two).facts == {"training_processes": 2}
    assert read_manifest(in_one_process).facts == {}
    timing = reference(str(root), RUN, "timings", "models-round-1")
    assert [(row["device"], row["items"]) for row in read_artifact(timing, "timings")] == [("2 x cpu", STEPS)]
    assert latest_checkpoint(Workspace(root), RUN, "round-1") is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_hosts_go_on_from_the_checkpoint_of_one_process(
    tmp_path: Path, own_temporary_folder: Path, in_one_process: ArtifactRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "workspace"
    preferences = commit_preferences(root)
    train = alignment.train

    def interrupted(*arguments: Any, **options: Any) -> Iterator[StepRecord]:
        for record in train(*arguments, **options):
            yield record
            if record.step == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(alignment, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aligned(preferences, configuration())
    mark_checkpoint(root)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = TrainingProcesses(per_host=1, hosts=2, rendezvous=address)
    with disable_run_logger(), ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(align_round.fn, preferences, configuration(), BASE, 1, hosts) for _ in range(2)]
        first, second = (call.result() for call in calls)
    assert first == second
    compare(first, in_one_process, marked=True)
    assert training_pids(own_temporary_folder) == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_that_is_no_number_stops_all_and_commits_nothing(tmp_path: Path, own_temporary_folder: Path) -> None:
    root = tmp_path / "workspace"
    said: list[object] = []
    with pytest.raises(TrainingDiverged, match="at step 2; training stopped and committed nothing") as caught:
        aligned(commit_preferences(root), configuration(learning_rate=1e30), TWO)
    said.extend(caught.value.__notes__)
    assert "TrainingDiverged" in str(said[0])
    assert committed_keys(Workspace(root), RUN, "models") == []
    assert training_pids(own_temporary_folder) == {}


# --- without a model ---


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
    with pytest.raises(StorageFull, match="rank 0 heard: the disk of rank 1 is full"):
        run_processes("light_rank", "fail", "failing", TWO, Report(lambda _: None, lambda _: None))
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
