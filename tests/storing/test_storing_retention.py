"""Old runs lose images, weights and checkpoints, and nothing else; a kill at any instant is taken over by the next."""

import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.artifacts import (
    REMOVED,
    ArtifactRef,
    artifact_digest,
    committed_keys,
    is_committed,
    read_manifest,
    require_present,
    verify,
)
from storage.catalog import query, rebuild_catalog
from storage.checkpoints import latest_checkpoint, staged_checkpoint
from storage.commit import staged_artifact
from storage.errors import CorruptArtifact, RemovedArtifact, RunInUse
from storage.image_latents import read_latents, write_latents
from storage.layout import Workspace
from storage.locks import run_lock
from storage.removal import remove
from storage.retention import Choice, check_complete, removable
from storage.schemas import TABLES
from storage.tables import read_artifact, read_images, read_rows, write_rows

DAY = 86400
NOW = 2_000_000_000.0
EVERYTHING = Choice(30, frozenset({"hold", "promote", "none"}), frozenset({"images", "checkpoints", "weights"}))
USUAL = Choice(30, frozenset({"hold", "none"}))
WEIGHTS = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors")

REMOVE = """
import sys
from storage.layout import Workspace
from storage.removal import remove
from storage.retention import Choice
choice = Choice(30, frozenset({"hold", "promote", "none"}), frozenset({"images", "checkpoints", "weights"}))
for run in remove(Workspace.open(sys.argv[1]), choice, frozenset, float(sys.argv[2])):
    assert not run.problem, run.problem
"""


def none_protected():
    return frozenset()


def ref_of(workspace, run_id, table, key):
    return ArtifactRef(str(workspace.root), run_id, table, key)


def commit(workspace, run_id, table, key, tables, files=()):
    ref = ref_of(workspace, run_id, table, key)
    with staged_artifact(ref) as folder:
        for name, rows in tables.items():
            write_rows(folder, name, rows)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(f"{run_id} {key} {name}".encode() * 50)
    return ref


def write_run(workspace, run_id, verdict=None, model="emoji", age_days=60.0):
    """Two shards of images, two models, checkpoints; decided or not; its last commit so long ago."""
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - (age_days + 1) * DAY))
    config = json.dumps({"model": model, "seed": 0, "expansion": {"prompts": ["a/b", "occupations"]}})
    commit(workspace, run_id, "runs", "config", {"runs": [row("runs", run_id, config_json=config)]})
    commit(workspace, run_id, "starts", "first", {"starts": [row("starts", run_id, started_at=started)]})
    for shard in range(2):
        ids = [f"{run_id}/{shard}/{index}" for index in range(3)]
        images = [{"sample_id": name, "image": name.encode() * 9, "format": "webp"} for name in ids]
        samples = [row("samples", run_id, sample_id=name) for name in ids]
        commit(workspace, run_id, "samples", f"base.evaluation.{shard:05d}", {"samples": samples, "images": images})
        labels = [row("attributes", run_id, sample_id=name) for name in ids]
        commit(workspace, run_id, "attributes", f"base.evaluation.{shard:05d}.judge", {"attributes": labels})
    for key in ("round-1", "round-2"):
        tables = {"models": [row("models", run_id, model_id=key)]}
        commit(workspace, run_id, "models", key, tables | {"training_steps": []}, WEIGHTS)
    with staged_checkpoint(workspace, run_id, "round-2", 50) as folder:
        (folder / "state.json").write_text("{}" * 100)
    (workspace.run_folder(run_id) / "report.html").write_text("report")
    if verdict is not None:
        decision = row("decisions", run_id, model_id="round-2", verdict=verdict)
        commit(workspace, run_id, "decisions", "round-2", {"decisions": [decision]})
    for manifest in workspace.run_folder(run_id).glob("*/*/manifest.json"):
        os.utime(manifest, (NOW - age_days * DAY, NOW - age_days * DAY))


def row(table, run_id, **values):
    """A row of any table: what is not given is empty."""
    found = {"run_id": run_id} | values
    for name, kind, _ in TABLES[table][1]:
        if not name.endswith("?") and name not in found:
            found[name] = {"string": "", "int32": 0, "int64": 0, "float": 0.0, "double": 0.0}.get(str(kind), [])
    return found


def contents(workspace):
    """Every file below the runs, by path, but what a lock or a tombstone is."""
    runs = workspace.runs
    paths = (path for path in runs.rglob("*") if path.is_file() and path.name not in ("lock", ".lock", REMOVED))
    return {path.relative_to(runs).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def gone(before, workspace):
    after = contents(workspace)
    assert {name: before[name] for name in after} == after, "what stays is byte by byte what it was"
    return before.keys() - after.keys()


def files_of(run_id, what):
    """What of `write_run` belongs to a part."""
    folders = {
        "images": [f"{run_id}/samples/base.evaluation.{shard:05d}/images.parquet" for shard in range(2)],
        "weights": [f"{run_id}/models/{key}/{name}" for key in ("round-1", "round-2") for name in WEIGHTS],
        "checkpoints": [f"{run_id}/.checkpoints/round-2/50/state.json"],
    }
    return set(folders[what])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Runs of every kind, made once and copied by each test."""
    place = Workspace.open(tmp_path_factory.mktemp("written"))
    write_run(place, "held", "hold")
    write_run(place, "promoted", "promote")
    write_run(place, "open")
    write_run(place, "young", "hold", age_days=29)
    return place


@pytest.fixture
def runs(written, tmp_path):
    shutil.copytree(written.root, tmp_path / "copy")
    return Workspace.open(tmp_path / "copy")


def test_a_list_touches_nothing(runs):
    before = contents(runs)
    found = {run.run_id: run for run in removable(runs, USUAL, now=NOW)}
    assert contents(runs) == before
    assert found.keys() == {"held", "open"}
    assert (found["held"].decision, found["held"].age_days) == ("hold", pytest.approx(60))
    for run_id, what in (("held", ("images", "weights", "checkpoints")), ("open", ("images", "checkpoints"))):
        parts = found[run_id].parts
        assert {part.what for part in parts} == set(what)
        for kind in what:
            sizes = sum((runs.runs / name).stat().st_size for name in files_of(run_id, kind))
            assert sum(part.bytes for part in parts if part.what == kind) == sizes


def test_the_usual_choice_leaves_promoted_and_young_runs_and_weights_of_unfinished_ones(runs):
    before = contents(runs)
    remove(runs, USUAL, none_protected, NOW)
    expected = [files_of("held", what) for what in ("images", "weights", "checkpoints")]
    expected += [files_of("open", what) for what in ("images", "checkpoints")]
    assert gone(before, runs) == set().union(*expected)
    assert removable(runs, USUAL, now=NOW) == []


def test_a_promoted_model_stays_whatever_is_asked_for(runs):
    before = contents(runs)
    remove(runs, replace(EVERYTHING, older_than_days=0), lambda: {("held", "round-1")}, NOW)
    lost = gone(before, runs)
    kept = {f"{run}/{name}" for run, key in (("promoted", "round-2"), ("held", "round-1")) for name in
            (f"models/{key}/{weights}" for weights in WEIGHTS)}  # fmt: skip
    assert not lost & kept
    every = {name for run in ("held", "promoted", "open", "young") for what in ("images", "weights", "checkpoints") for
             name in files_of(run, what)}  # fmt: skip
    assert lost == every - kept


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    age=st.floats(0, 90),
    decisions=st.frozensets(st.sampled_from(["hold", "promote", "none"]), min_size=1),
    what=st.none() | st.frozensets(st.sampled_from(["images", "checkpoints", "weights"]), min_size=1),
)
def test_tables_stay_and_queries_work_whatever_is_chosen(written, tmp_path_factory, age, decisions, what):
    place = Workspace.open(shutil.copytree(written.root, tmp_path_factory.mktemp("any") / "copy"))
    before = contents(place)
    digests = {ref: artifact_digest(ref) for table in ("samples", "models") for ref in all_refs(place, table)}
    choice = Choice(age, decisions, what)
    listed = removable(place, choice, now=NOW)
    assert remove(place, choice, none_protected, NOW) == listed
    lost = gone(before, place)
    assert len(lost) == sum(len(part.names) for run in listed for part in run.parts) + sum(
        part.what == "checkpoints" for run in listed for part in run.parts
    )
    assert not any(name.endswith(".parquet") and not name.endswith("/images.parquet") for name in lost)
    for ref, digest in digests.items():
        assert is_committed(ref)
        assert artifact_digest(ref) == digest
        verify(ref)
    rebuild_catalog(place)
    for table in TABLES.keys() - {"images"}:
        (count,) = query(place, f'SELECT count(*) AS n FROM "{table}"')["n"].to_pylist()
        assert count == sum(len(read_rows(place, run, table)) for run in place.run_ids())
    (images,) = query(place, "SELECT count(*) AS n FROM images")["n"].to_pylist()
    assert images == 24 - 3 * sum(name.endswith("/images.parquet") for name in lost)


def all_refs(workspace, table):
    return [ref for run in workspace.run_ids() for ref in committed_keys(workspace, run, table)]


KILLS = ["before_tombstone:samples", "after_tombstone:samples", "after_unlink:samples:2", "before_tombstone:models:2"]
KILLS += ["after_tombstone:models", "after_unlink:models:1", "after_unlink:models:4", "after_rename:checkpoints"]


@pytest.mark.parametrize("kill", KILLS)
def test_a_removal_killed_at_any_point_is_finished_by_the_next(tmp_path, written, child, kill):
    place = Workspace.open(tmp_path / "copy")
    shutil.copytree(written.run_folder("held"), place.run_folder("held"))
    before = contents(place)
    rebuild_catalog(place)
    killed = child(REMOVE, str(place.root), str(NOW), POPALIGN_KILL_AT=kill)
    _, stderr = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, stderr
    for ref in [*all_refs(place, "samples"), *all_refs(place, "models")]:
        verify(ref)
    # Either a checkpoint is whole, or there is none.
    latest = latest_checkpoint(place, "held", "round-2")
    assert latest is None or (latest / "state.json").read_text() == "{}" * 100

    again = child(REMOVE, str(place.root), str(NOW))
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    assert gone(before, place) == files_of("held", "images") | files_of("held", "weights") | files_of(
        "held", "checkpoints"
    )
    for ref in [*all_refs(place, "samples"), *all_refs(place, "models")]:
        verify(ref)
    assert removable(place, EVERYTHING, now=NOW) == []
    assert [path.name for path in (place.run_folder("held") / ".staging").iterdir()] == ["lock"]
    assert not list(place.runs.rglob(f".{REMOVED}~*"))
    assert query(
        place, "SELECT (SELECT count(*) FROM images) AS a, (SELECT count(*) FROM samples) AS b"
    ).to_pylist() == [{"a": 0, "b": 6}]


def test_what_was_removed_is_told_by_name_and_other_damage_is_still_found(runs):
    remove(runs, EVERYTHING, none_protected, NOW)
    samples, model = ref_of(runs, "held", "samples", "base.evaluation.00000"), ref_of(runs, "held", "models", "round-1")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    with pytest.raises(
        RemovedArtifact, match=rf"images\.parquet of samples/.* of run held was removed .*{day}.*hold, 60"
    ):
        read_artifact(samples, "images")
    with pytest.raises(RemovedArtifact, match="unet of models/round-1 of run held was removed by `popalign gc` on"):
        require_present(model, "unet")
    require_present(model, "lora")
    assert len(read_artifact(samples, "samples")) == 3
    assert read_images(runs, "held", ["held/0/0"]) == {}
    assert len(read_images(runs, "young", ["young/0/0"])) == 1

    (samples.folder / "samples.parquet").unlink()
    with pytest.raises(CorruptArtifact, match=r"samples\.parquet is missing"):
        verify(samples)
    tombstone = model.folder / REMOVED
    tombstone.write_text(tombstone.read_text().replace(read_manifest(model).files[WEIGHTS[0]].sha256, "0" * 64))
    with pytest.raises(CorruptArtifact, match=r"config\.json is missing"):
        verify(model)
    tombstone.write_text("{")
    with pytest.raises(CorruptArtifact, match=r"removed\.json does not say which files"):
        verify(model)


def test_a_file_that_came_back_damaged_is_found(runs):
    remove(runs, EVERYTHING, none_protected, NOW)
    ref = ref_of(runs, "held", "samples", "base.evaluation.00000")
    (ref.folder / "images.parquet").write_bytes(b"half")
    with pytest.raises(CorruptArtifact, match="has 4 bytes"):
        verify(ref)


def test_an_unfinished_run_that_lost_files_cannot_go_on_and_a_decided_one_can(runs):
    for run_id in ("held", "open", "young"):
        check_complete(runs, run_id)
    remove(runs, USUAL, none_protected, NOW)
    check_complete(runs, "held")
    with pytest.raises(RemovedArtifact, match=r"run 'open' in .* was not finished and cannot go on"):
        check_complete(runs, "open")


def test_checkpoints_alone_are_a_shortcut_without_which_a_run_goes_on(runs):
    remove(runs, replace(EVERYTHING, what=frozenset({"checkpoints"})), none_protected, NOW)
    assert latest_checkpoint(runs, "open", "round-2") is None
    check_complete(runs, "open")


def test_a_run_in_use_stays_and_says_so(runs, child):
    code = "import sys; from storage.layout import Workspace; from storage.locks import run_lock\n"
    code += "with run_lock(Workspace.open(sys.argv[1]), 'held'): print('locked', flush=True); sys.stdin.read()"
    holder = child(code, str(runs.root))
    assert holder.stdout.readline() == "locked\n"
    before = contents(runs)
    outcome = {run.run_id: run for run in remove(runs, USUAL, none_protected, NOW)}
    assert outcome["held"].parts == ()
    assert f"being worked on by process {holder.pid}" in outcome["held"].problem
    assert {name.split("/")[0] for name in gone(before, runs)} == {"open"}


def test_a_run_is_locked_while_it_loses_files(runs, monkeypatch):
    def locked(_, run, __):
        with pytest.raises(RunInUse), run_lock(runs, run.run_id):
            pass

    monkeypatch.setattr("storage.removal._remove_part", locked)
    assert [run.run_id for run in remove(runs, USUAL, none_protected, NOW)] == ["held", "open"]


def test_a_model_promoted_since_it_was_listed_stays(runs):
    """Who is protected is asked again under the lock of each run."""
    before = contents(runs)
    answers = iter([frozenset()])
    remove(runs, USUAL, lambda: next(answers, {("held", "round-1"), ("held", "round-2")}), NOW)
    assert not gone(before, runs) & files_of("held", "weights")


@pytest.mark.parametrize(
    "form", ["{root}/runs/held/models/round-1/unet", "workspace:runs/held/models/round-1/unet", "held/round-1"]
)
def test_a_model_that_an_unfinished_run_starts_from_stays(runs, form):
    write_run(runs, "next", model=form.format(root=runs.root), age_days=1)
    before = contents(runs)
    remove(runs, USUAL, none_protected, NOW)
    lost = gone(before, runs) & files_of("held", "weights")
    assert lost == {f"held/models/round-2/{name}" for name in WEIGHTS}

    # Once that run cannot go on, it needs no model.
    remove(runs, Choice(0, frozenset({"none"}), frozenset({"images"})), none_protected, NOW)
    remove(runs, USUAL, none_protected, NOW)
    assert files_of("held", "weights") <= gone(before, runs)


def test_the_age_begins_with_the_last_commit_or_start(runs):
    ref = commit(runs, "held", "timings", "late", {"timings": []})
    os.utime(ref.folder / "manifest.json", (NOW - 29 * DAY, NOW - 29 * DAY))
    assert [run.run_id for run in removable(runs, USUAL, now=NOW)] == ["open"]
    started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(NOW - 2 * DAY))
    ref = commit(runs, "open", "starts", "again", {"starts": [row("starts", "open", started_at=started)]})
    os.utime(ref.folder / "manifest.json", (0, 0))
    assert removable(runs, USUAL, now=NOW) == []
    assert len(removable(runs, replace(USUAL, older_than_days=1.9), now=NOW)) == 3


def test_a_damaged_run_keeps_no_other(runs):
    (ref_of(runs, "held", "samples", "base.evaluation.00001").folder / "manifest.json").write_text("{")
    before = contents(runs)
    outcome = {run.run_id: run for run in remove(runs, USUAL, none_protected, NOW)}
    assert "is not a manifest" in outcome["held"].problem
    assert {name.split("/")[0] for name in gone(before, runs)} == {"open"}


def test_a_table_below_a_part_and_a_card_beside_it_stay(workspace):
    files = ("unet/weights.safetensors", "unet/log.parquet", "README.md")
    commit(workspace, "odd", "models", "round-1", {"models": []}, files)
    (run,) = removable(workspace, replace(EVERYTHING, older_than_days=0), now=time.time() + 1)
    assert [part.names for part in run.parts] == [("unet/weights.safetensors",)]
    assert Path(run.parts[0].ref.folder).is_dir()


def test_latents_encoded_for_training_go_with_checkpoints(runs):
    write_latents(runs, "held", "vae", "abc", (np.zeros(3, np.float32), np.ones(3, np.float32)))
    before = contents(runs)
    remove(runs, replace(EVERYTHING, what=frozenset({"checkpoints"})), none_protected, NOW)
    assert "held/.latents/vae/abc.npz" in gone(before, runs)
    assert read_latents(runs, "held", "vae", "abc") is None
