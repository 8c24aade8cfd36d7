"""A round in several processes: the same model, and nothing left of it, whatever ends it."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from living_processes import listening_addresses, set_temporary_folder, training_pids, wait_until
from prefect.logging import disable_run_logger
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from popalign_core.alignment.trainer import StepRecord
from popalign_core.config import RunConfig, with_settings
from popalign_core.errors import LostProcess, TrainingDiverged
from popalign_core.models import emoji
from popalign_core.presets import preset
from storage.artifacts import ArtifactRef, committed_keys, read_manifest
from storage.checkpoints import latest_checkpoint
from storage.commit import staged_artifact
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks import alignment
from tasks.alignment import align_round
from tasks.run import BASE, reference
from tasks.training_checkpoints import RECORDS
from tasks.training_processes import ONE, TrainingProcesses

RUN = "shared"
PAIRS, STEPS = 5, 14
TWO = TrainingProcesses(per_host=2)
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
BASE_UNET = Path(emoji.__file__).parent / "pipeline" / UNET
# Rounding. The mean squared errors, below 1, are off by some 100 roundings of 2^-24 that have passed the layers; the
# slope of the loss by them is at most beta = 500, over 3 pairs: 500 * 100 * 2^-24 = 3e-3 if all were off the same way,
# a tenth of it without a common sign.
LOSS_TOLERANCE = 3e-4
NORM_TOLERANCE = 3e-3
MARK = 123.0
LOOPBACK = "0100007F"  # as /proc writes 127.0.0.1


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


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_temporary_folder(tmp_path / "temporary", monkeypatch)


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    return aligned(commit_preferences(tmp_path_factory.mktemp("one")), configuration())


def compare(got: ArtifactRef, expected: ArtifactRef) -> None:
    """The same steps and weights up to rounding; the first step's record is from the checkpoint that was marked."""
    rows, wanted = read_artifact(got, "training_steps"), read_artifact(expected, "training_steps")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["loss"] == MARK
    for one, two in list(zip(wanted, rows, strict=True))[1:]:
        assert two["loss"] == pytest.approx(one["loss"], abs=LOSS_TOLERANCE)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=NORM_TOLERANCE)
        assert two["implicit_accuracy"] == pytest.approx(one["implicit_accuracy"], abs=1e-6)
        assert two["pairs"] == 3
    base, one, two = load_file(BASE_UNET), load_file(expected.folder / UNET), load_file(got.folder / UNET)
    moved = sum(float((one[name] - base[name].float()).square().sum()) for name in one)
    apart = sum(float((one[name] - two[name]).square().sum()) for name in one)
    assert moved > 0
    # Adam divides a gradient by its own size: where one is little more than rounding, so is its sign.
    assert apart < 0.02**2 * moved


def state_step(root: Path) -> int:
    folder = latest_checkpoint(Workspace(root), RUN, "round-1")
    assert folder is not None
    return int(folder.name)


def mark_checkpoint(root: Path) -> None:
    """Gives the record of the first step a loss that no step would have."""
    folder = latest_checkpoint(Workspace(root), RUN, "round-1")
    assert folder is not None
    records = json.loads((folder / RECORDS).read_text())
    records[0]["loss"] = MARK
    (folder / RECORDS).write_text(json.dumps(records))


def lose_one_of_two(preferences: ArtifactRef, config: RunConfig, temporary: Path) -> None:
    """Kills the second process after the first checkpoint; meanwhile, looks at what all of them listen to."""
    place = Workspace(Path(preferences.workspace))
    addresses: list[str] = []

    def kill_second_rank() -> None:
        wait_until(lambda: latest_checkpoint(place, RUN, "round-1"))
        pids = training_pids(temporary)
        assert sorted(pids.values()) == ["", "0", "1"]
        addresses.extend(address for pid in pids for address in listening_addresses(pid))
        os.kill(next(pid for pid, rank in pids.items() if rank == "1"), signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill_second_rank)
        with pytest.raises(LostProcess, match=r"training process 1 was ended by SIGKILL.*last checkpoint"):
            aligned(preferences, config, TWO)
        killer.result()
    assert training_pids(temporary) == {}
    assert list(temporary.iterdir()) == []
    assert addresses
    assert set(addresses) == {LOOPBACK}, "nothing listens beyond 127.0.0.1"
    assert committed_keys(place, RUN, "models") == []
    assert committed_keys(place, RUN, "timings") == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.stack)])
def test_a_killed_process_ends_all_and_any_number_goes_on(
    tmp_path: Path,
    own_temporary_folder: Path,
    in_one_process: ArtifactRef,
    monkeypatch: pytest.MonkeyPatch,
    sharded: bool,
) -> None:
    """Two processes, of which one is killed; then one, which is interrupted; then two hosts of one each."""
    root, config = tmp_path / "workspace", configuration(sharded=sharded)
    preferences = commit_preferences(root)
    lose_one_of_two(preferences, config, own_temporary_folder)

    mark_checkpoint(root)
    reached = state_step(root)
    train = alignment.train

    def interrupted(*arguments: Any, **options: Any) -> Iterator[StepRecord]:
        for record in train(*arguments, **options):
            yield record
            if record.step == reached + 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(alignment, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aligned(preferences, config)
    assert state_step(root) == reached + 4

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = TrainingProcesses(per_host=1, hosts=2, rendezvous=address)
    with disable_run_logger(), ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(align_round.fn, preferences, config, BASE, 1, hosts) for _ in range(2)]
        first, second = (call.result() for call in calls)
    assert first == second
    compare(first, in_one_process)
    alone = read_manifest(in_one_process).facts
    assert read_manifest(first).facts == {**alone, "training_processes": 2}
    timing = reference(str(root), RUN, "timings", "models-round-1")
    assert [(row["device"], row["items"]) for row in read_artifact(timing, "timings")] == [("2 x cpu", STEPS)]
    assert latest_checkpoint(Workspace(root), RUN, "round-1") is None
    assert training_pids(own_temporary_folder) == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_that_is_no_number_stops_all_and_commits_nothing(tmp_path: Path, own_temporary_folder: Path) -> None:
    root = tmp_path / "workspace"
    with pytest.raises(TrainingDiverged, match="at step 2; training stopped and committed nothing") as caught:
        aligned(commit_preferences(root), configuration(learning_rate=1e30), TWO)
    assert "TrainingDiverged" in caught.value.__notes__[0], "the traceback of the process"
    assert committed_keys(Workspace(root), RUN, "models") == []
    assert training_pids(own_temporary_folder) == {}
