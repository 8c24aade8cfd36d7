"""A whole run killed over and over, at named points and at random times, ends with the artifacts of an undisturbed one.

The kills of a test hit one workspace after another, each restart of the same command taking over what the last left.
"""

import logging
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from plain_run import BESIDE_A_PLAIN_RUN
from prefect.context import refresh_global_settings_context
from prefect.logging.configuration import setup_logging
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from typer.testing import CliRunner

from flows.cli import app, main
from flows.in_process import quiet_prefect
from storage.artifacts import ArtifactRef, artifact_digest, committed_keys, verify
from storage.catalog import query
from storage.layout import STAGING, Workspace
from storage.schemas import FOLDER, TABLES
from storage.tables import read_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["flows.debias", "prefect.testing.utilities", "pytest", "typer.testing"])
RUN = "r"
SETTINGS = {
    "device": "cpu",
    "expansion.axes": "perceived_gender",
    "expansion.max_subjects": "2",
    "sampling.steps": "2",
    "sampling.batch_size": "4",
    "sampling.shard_size": "16",
    "images.train_neutral": "12",
    "images.validation": "1",
    "images.evaluation": "1",
    "images.trained": "1",
    "images.obedience": "1",
    "populations.weighting": "even",
    "alignment.rounds": "1",
    "alignment.steps": "2",
    "alignment.pairs_per_step": "2",
    "alignment.checkpoint_steps": "1",
    "assessment.resamples": "200",
}
POINTS = ("before_manifest:samples:2", "after_stage:attributes", "before_rename:models")
POINTS += ("after_commit:models", "after_commit:disparities")
SEED = 20
RANDOM_KILLS = 3
# A machine that is busy with other work takes ten times as long.
PROCESS_SECONDS = 1200
# Images and checkpoints fit, a UNet does not.
SMALL_FILES = 12_000_000
# What differs from run to run by its nature.
OWN_TO_A_RUN = {"starts", "timings"}
COMPARED = [table for table in TABLES if table not in OWN_TO_A_RUN | BESIDE_A_PLAIN_RUN]

log = logging.getLogger(__name__)


def command_line(output: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """What a terminal starts, in a fresh process that has the libraries already: they take longer than a tiny run.

    In a session of its own: Prefect's temporary server, which outlives a killed parent, can be ended with it.
    """
    os.setsid()
    if limit := environment.pop("LARGEST_FILE", ""):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    with output.open("ab") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    # What the command would set before Prefect is imported, which it is here already.
    quiet_prefect()
    refresh_global_settings_context()
    setup_logging()
    sys.argv = ["popalign", *arguments]
    main()


def start_run(root: Path, changes: dict[str, str] | None = None, **environment: str) -> ForkServerProcess:
    chosen = SETTINGS | (changes or {})
    settings = [part for name, value in chosen.items() for part in ("--set", f"{name}={value}")]
    arguments = ["run", "emoji", "--run-id", RUN, "--workspace", str(root), *settings]
    process = PROCESSES.Process(target=command_line, args=(output_of(root), arguments, environment))
    process.start()
    return process


def output_of(root: Path) -> Path:
    return root.with_suffix(".txt")


def exit_code(process: ForkServerProcess) -> int | None:
    process.join(PROCESS_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    return process.exitcode


def references(root: Path) -> list[ArtifactRef]:
    place = Workspace(root)
    return [ref for table in COMPARED if table not in FOLDER for ref in committed_keys(place, RUN, table)]


def digests(root: Path) -> dict[str, str]:
    return {f"{ref.table}/{ref.key}": artifact_digest(ref) for ref in references(root)}


def commits(root: Path) -> int:
    return len(list(root.glob("runs/*/*/*/manifest.json")))


def drafts(root: Path) -> list[Path]:
    return list((root / "runs" / RUN / STAGING).glob("*~*"))


def half_commits(root: Path) -> list[Path]:
    return [path for path in (root / "runs" / RUN).glob("[a-z]*/*") if not (path / "manifest.json").is_file()]


@dataclass(frozen=True)
class Undisturbed:
    """A finished run to compare with. rows: of every table, by artifact and table."""

    digests: dict[str, str]
    rows: dict[tuple[str, str], int]
    commits: int
    seconds: float

    def rows_in(self, name: str, artifacts: dict[str, str]) -> int:
        return sum(self.rows.get((artifact, name), 0) for artifact in artifacts)


def rows_by_artifact(root: Path) -> dict[tuple[str, str], int]:
    tables = [(ref, name) for ref in references(root) for name in COMPARED if FOLDER.get(name, name) == ref.table]
    return {(f"{ref.table}/{ref.key}", name): len(read_artifact(ref, name)) for ref, name in tables}


@pytest.fixture(scope="session")
def prefect_api() -> Generator[str]:
    """One server for all runs but the randomly killed: starting one takes a fifth of a tiny run."""
    with prefect_test_harness(server_startup_timeout=600):
        yield str(PREFECT_API_URL.value())


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed") / "workspace"
    started = time.monotonic()
    process = start_run(root, PREFECT_API_URL=prefect_api)
    assert exit_code(process) == 0, output_of(root).read_text()
    seconds = time.monotonic() - started
    empty = [table for table in COMPARED if table not in FOLDER and not committed_keys(Workspace(root), RUN, table)]
    assert empty == []
    return Undisturbed(digests(root), rows_by_artifact(root), commits(root), seconds)


def assert_only_whole_artifacts_are_read(root: Path, undisturbed: Undisturbed) -> None:
    """Through the command line, which writes the catalog, and through the catalog that it wrote."""
    found = digests(root)
    assert found.items() <= undisturbed.digests.items()
    for ref in references(root):
        verify(ref)
    expected = {name: undisturbed.rows_in(name, found) for name in COMPARED}
    shown = CliRunner().invoke(app, ["sql", "SELECT 'images:' || count(*) AS n FROM images", "--workspace", str(root)])
    assert f"images:{expected['images']}" in shown.output
    place = Workspace(root)
    counted = {name: query(place, f"SELECT count(*) AS n FROM {name}").to_pylist()[0]["n"] for name in COMPARED}
    assert counted == expected


def assert_it_ends_like(root: Path, undisturbed: Undisturbed, starts: int) -> None:
    assert digests(root) == undisturbed.digests
    assert_only_whole_artifacts_are_read(root, undisturbed)
    assert len(committed_keys(Workspace(root), RUN, "starts")) == starts
    assert (root / "runs" / RUN / "report.html").is_file()
    assert [path.name for path in (root / "runs" / RUN / STAGING).iterdir()] == ["lock"]
    assert half_commits(root) == []
    assert list((root / "runs" / RUN / ".checkpoints").glob("*/*")) == []


def test_killed_at_named_points_it_ends_with_the_same_artifacts(
    tmp_path: Path, undisturbed: Undisturbed, prefect_api: str
) -> None:
    root = tmp_path / "workspace"
    for point in POINTS:
        killed = start_run(root, PREFECT_API_URL=prefect_api, POPALIGN_KILL_AT=point)
        assert exit_code(killed) == -signal.SIGKILL, f"{point}: {output_of(root).read_text()}"
        assert drafts(root), point
        assert bool(half_commits(root)) == point.startswith("before_manifest"), point
        assert_only_whole_artifacts_are_read(root, undisturbed)
    assert exit_code(start_run(root, PREFECT_API_URL=prefect_api)) == 0, output_of(root).read_text()
    assert_it_ends_like(root, undisturbed, len(POINTS) + 1)


def test_a_full_disk_is_one_message_and_loses_nothing(
    tmp_path: Path, undisturbed: Undisturbed, prefect_api: str
) -> None:
    root = tmp_path / "workspace"
    full = start_run(root, PREFECT_API_URL=prefect_api, LARGEST_FILE=str(SMALL_FILES))
    assert exit_code(full) == 2
    said = " ".join(output_of(root).read_text().split())
    assert "was not written" in said
    assert "Traceback" not in said
    assert committed_keys(Workspace(root), RUN, "models") == []
    assert_only_whole_artifacts_are_read(root, undisturbed)
    assert exit_code(start_run(root, PREFECT_API_URL=prefect_api)) == 0, output_of(root).read_text()
    assert_it_ends_like(root, undisturbed, starts=2)


def test_a_loss_that_is_no_number_is_one_message_and_commits_no_model(tmp_path: Path, prefect_api: str) -> None:
    root = tmp_path / "workspace"
    steep = {"alignment.learning_rate": "1e30"}
    assert exit_code(start_run(root, steep, PREFECT_API_URL=prefect_api)) == 2
    said = " ".join(output_of(root).read_text().split())
    assert "step 2" in said
    assert "Traceback" not in said
    assert committed_keys(Workspace(root), RUN, "models") == []


def kill_later(process: ForkServerProcess, root: Path, seconds: float, committed: int) -> None:
    """After that time or, where the machine got faster, once so many artifacts are there."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < deadline and commits(root) < committed:
        time.sleep(0.02)
    process.kill()


@pytest.mark.stack
def test_killed_at_random_times_it_ends_with_the_same_artifacts(tmp_path: Path, undisturbed: Undisturbed) -> None:
    """With a Prefect home of its own, so that an early kill hits the making of Prefect's database, too."""
    root, home = tmp_path / "workspace", {"PREFECT_HOME": str(tmp_path / "prefect")}
    rng = random.Random(SEED)
    # One in each third: the start-up takes most of a tiny run.
    shares = [rng.uniform(third, third + 1) / RANDOM_KILLS for third in range(RANDOM_KILLS)]
    for share in shares:
        seconds, before = share * undisturbed.seconds, commits(root)
        process = start_run(root, **home)
        kill_later(process, root, seconds, before + ceil(share * max(undisturbed.commits - before, 0)))
        code, after = exit_code(process), commits(root)
        log.warning("seed %d: killed after %.2f s at most, %d to %d artifacts", SEED, seconds, before, after)
        assert code == -signal.SIGKILL, output_of(root).read_text()
        assert_only_whole_artifacts_are_read(root, undisturbed)
    starts = len(committed_keys(Workspace(root), RUN, "starts"))
    assert exit_code(start_run(root, **home)) == 0, output_of(root).read_text()
    assert_it_ends_like(root, undisturbed, starts + 1)
