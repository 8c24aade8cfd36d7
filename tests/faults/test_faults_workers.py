"""One run on two workers, disturbed in every stage: it ends with the artifacts of an undisturbed run in one process.

The disturbances hit the same run one after another, and each is followed by what an operator sees: a run that goes on.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from killable import GPU_WORKERS, Stack, wait_for
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Scheduled

from storage.artifacts import artifact_digest, committed_keys, verify
from storage.layout import STAGING, Workspace
from storage.schemas import FOLDER, TABLES

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

RUN = "r"
DECIDED = ("Held", "QualityGateFailed", "Completed")
ENDED = (*DECIDED, "Failed", "Crashed", "Cancelled")
OWN_TO_A_RUN = {"starts", "timings"}
SETTINGS = (
    "device=cpu expansion.axes=perceived_gender expansion.max_subjects=2 sampling.steps=10 sampling.batch_size=8 "
    "sampling.shard_size=8 images.train_neutral=24 images.validation=4 images.evaluation=4 images.trained=1 "
    "images.obedience=2 populations.weighting=even alignment.rounds=1 alignment.steps=20 alignment.pairs_per_step=2 "
    "alignment.checkpoint_steps=4 assessment.resamples=200"
).split()


def digests(root: Path) -> dict[str, str]:
    place = Workspace(root)
    tables = [table for table in TABLES if table not in FOLDER and table not in OWN_TO_A_RUN]
    refs = [ref for table in tables for ref in committed_keys(place, RUN, table)]
    for ref in refs:
        verify(ref)
    return {f"{ref.table}/{ref.key}": artifact_digest(ref) for ref in refs}


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> dict[str, str]:
    root = stack.folder / "undisturbed"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    code = "import sys; from flows.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", "emoji", "--run-id", RUN, "-w", str(root), *settings]
    subprocess.run(command, env=stack.environment(), cwd=stack.folder / "checkout", check=True, timeout=600)
    return digests(root)


def start(stack: Stack, root: Path, **changes: object) -> FlowRun:
    parameters = {
        "run_id": RUN,
        "preset_name": "emoji",
        "settings": SETTINGS,
        "config": None,
        "workspace": str(root),
        "execution": {"placement": "workers"},
        **changes,
    }
    with stack.client() as client:
        deployment = client.read_deployment_by_name("debias/debias")
        return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)


def state_of(stack: Stack, run_id: UUID) -> str:
    with stack.client() as client:
        return str(client.read_flow_run(run_id).state_name)


def crashed(stack: Stack, name: str) -> bool:
    return any(run.state_name == "Crashed" for run in stack.named(name))


def silent_death(stack: Stack, worker: str) -> UUID:
    """What that worker runs first dies at its crash point, and the worker with it: nobody says that they died."""
    found: list[tuple[int, str]] = []
    wait_for(f"a process of {worker}", lambda: found.extend(stack.run_processes(worker)) or found)
    ((pid, run_id),) = found
    os.kill(stack.processes[worker].pid, signal.SIGSTOP)  # before its child dies, which it would report
    wait_for("the death of the process", lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    stack.kill(worker, group=True)
    return UUID(run_id)


def committed(root: Path, pattern: str) -> bool:
    return any(root.glob(f"runs/{RUN}/{pattern}"))


def test_disturbed_in_every_stage_it_ends_with_the_same_artifacts(stack: Stack, undisturbed: dict[str, str]) -> None:
    root = stack.folder / "disturbed"
    first, _ = GPU_WORKERS
    # Alone at first: another worker might take the only shard, and this one would end in peace.
    for worker in GPU_WORKERS:
        stack.kill(worker)
    stack.launch_worker(first, "popalign-gpu", 1, POPALIGN_KILL_AT="before_manifest:samples")
    run = start(stack, root)
    silent = silent_death(stack, first)
    with stack.locked_database():
        time.sleep(5)
    # Classification and training are quick: their processes end themselves, until there are other workers.
    stack.new_gpu_workers(POPALIGN_KILL_AT="before_manifest:attributes")
    wait_for("a crash of classification", lambda: crashed(stack, f"classification {RUN} base"), 600)
    stack.new_gpu_workers()
    # The server is gone for a while, in the middle of a stage.
    wait_for("counterfactuals", lambda: committed(root, "counterfactuals/*/manifest.json"))
    stack.kill("server")
    time.sleep(5)
    stack.launch_server()
    stack.new_gpu_workers(POPALIGN_KILL_AT="after_rename:checkpoints:2")
    wait_for("a crash of training", lambda: crashed(stack, f"training {RUN} round 1"))
    assert committed(root, ".checkpoints/round-1/8/*")
    stack.new_gpu_workers()
    wait_for("the model", lambda: committed(root, "models/round-1/manifest.json"), 600)
    # The flow that orders the others, with its worker; its runs on workers go on, and the retry takes them over.
    wait_for("evaluation", lambda: committed(root, "samples/base.evaluation.*/manifest.json"), 600)
    ((parent, _),) = [hit for hit in stack.run_processes("cpu") if hit[1] == str(run.id)][:1]
    stack.kill("cpu", group=True)
    os.kill(parent, signal.SIGKILL)
    stack.launch_worker("cpu", "popalign-cpu", 4)
    wait_for("the crash", lambda: state_of(stack, run.id) == "Crashed")
    with stack.client() as client:  # what Retry on the run's page does
        client.set_flow_run_state(run.id, Scheduled(name="AwaitingRetry"), force=True)
    wait_for("the end", lambda: state_of(stack, run.id) in ENDED)
    assert state_of(stack, run.id) in DECIDED
    assert digests(root) == undisturbed
    assert state_of(stack, silent) == "Crashed"  # by the automation, since its heartbeat stopped
    assert not [
        path for path in (root / "runs" / RUN / STAGING).iterdir() if path.suffix != ".claim" and path.name != "lock"
    ]


def test_cancelled_it_stops_within_thirty_seconds_and_can_go_on(stack: Stack, undisturbed: dict[str, str]) -> None:
    root = stack.folder / "cancelled"
    run = start(stack, root)
    wait_for("sampling", lambda: committed(root, "samples/base.round-1.*/manifest.json"))
    with stack.client() as client:
        client.set_flow_run_state(run.id, Cancelling())
    wait_for("the end of all processes", lambda: not any(map(stack.run_processes, ("cpu", *GPU_WORKERS))), 30)
    done = digests(root)
    assert done.items() < undisturbed.items()
    wait_for("the state", lambda: state_of(stack, run.id) == "Cancelled")
    time.sleep(3)
    assert digests(root) == done
    # The same run id goes on, here in one process.
    again = start(stack, root, execution={"placement": "process"})
    wait_for("the end", lambda: state_of(stack, again.id) in ENDED)
    assert state_of(stack, again.id) in DECIDED
    assert digests(root) == undisturbed


def test_a_second_run_of_the_same_id_is_refused_by_name(stack: Stack) -> None:
    root = stack.folder / "twice"
    first = start(stack, root, execution={"placement": "process"})
    wait_for("the first run's prompts", lambda: committed(root, "prompts/all/manifest.json"))
    with stack.client() as client:
        deployment = client.read_deployment_by_name("expansion/cpu")
        second = client.create_flow_run_from_deployment(
            deployment.id, parameters={"run_id": RUN, "workspace": str(root)}
        )
    wait_for("the refusal", lambda: state_of(stack, second.id) == "Failed", 120)
    with stack.client() as client:
        state = client.read_flow_run(second.id).state
        client.set_flow_run_state(first.id, Cancelling())
    assert state is not None
    assert f"run '{RUN}'" in str(state.message)
    assert "is being worked on by process" in str(state.message)


def test_the_nightly_schedule_yields_runs(stack: Stack) -> None:
    """With SQLAlchemy 2.1 and Prefect 3.8 a schedule stays silently empty."""
    with stack.client() as client:
        nightly = client.read_deployment_by_name("nightly/debias-nightly")
        wait_for("scheduled runs", lambda: [r for r in client.read_flow_runs() if r.deployment_id == nightly.id], 120)
        runs = [run for run in client.read_flow_runs() if run.deployment_id == nightly.id]
    assert {run.state_name for run in runs} == {"Scheduled"}
    times = sorted(run.expected_start_time for run in runs if run.expected_start_time)
    assert len({time.date() for time in times}) == len(times) >= 2
