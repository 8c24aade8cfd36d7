"""Files of older table versions become current ones with the same rows, whatever interrupts it; every version can."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from older_tables import CONFIG, FORMS, RECORD, Form, columns_now
from typer.testing import CliRunner

from flows.cli import app
from storage import compaction, rewriting
from storage.artifacts import MANIFEST, ArtifactRef, artifact_digest, read_manifest, verify
from storage.catalog import query, rebuild_catalog
from storage.commit import staged_artifact
from storage.compaction import FEWEST_FILES, compact
from storage.errors import CorruptArtifact, RunInUse, SchemaMismatch, WorkspaceTooNew
from storage.layout import STAGING, Workspace
from storage.locks import run_lock
from storage.migrations import STEPS, explanation, missing_steps
from storage.registry import model_entry, require_weights, set_current
from storage.rewriting import OldFile, migrate, old_files, rewrite_old_files
from storage.schemas import FOLDER, VERSIONS, schema
from storage.tables import read_artifact, read_rows, write_rows

BY_NAME = {form.name: form for form in FORMS}
REWRITE = "import sys\nfrom storage.layout import Workspace\nfrom storage.rewriting import rewrite_old_files\n"
REWRITE += "rewrite_old_files(Workspace.open(sys.argv[1]))"
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "YOUNGEST_NS", 0)
    monkeypatch.setattr(rewriting, "YOUNGEST_NS", 0)


def commit(workspace: Workspace, *names: str, key: str = "all") -> ArtifactRef:
    """Older forms of tables, in one artifact of the first one's run."""
    forms = [BY_NAME[name] for name in names]
    table = forms[0].table
    ref = ArtifactRef(str(workspace.root), forms[0].name, FOLDER.get(table, table), key)
    with staged_artifact(ref, {"host": "h"}) as folder:
        for form in forms:
            form.write(folder)
    return ref


def commit_rows(workspace: Workspace, run_id: str, table: str, **values: Any) -> None:
    with staged_artifact(ArtifactRef(str(workspace.root), run_id, table, "all")) as folder:
        write_rows(folder, table, [{"run_id": run_id, **values}])


def commit_copied_run(workspace: Workspace) -> None:
    """So many shards that they are copied for queries, once the run is decided."""
    for shard in range(FEWEST_FILES):
        commit(workspace, "group_shares-1", key=f"shard-{shard:02}")
    decision = {"base_model_id": "base", "model_id": "m", "verdict": "hold", "reason": "r", "checks": []}
    commit_rows(workspace, "group_shares-1", "decisions", **decision)


def without(rows: Rows, form: Form) -> Rows:
    return [{name: None if name in form.derived else value for name, value in row.items()} for row in rows]


@dataclass
class Migrated:
    """A workspace with every older form, each in a run of its own. before, after: rows by form and reader."""

    place: Workspace
    refs: dict[str, ArtifactRef]
    digests: dict[str, str]
    found: dict[str, OldFile]
    before: dict[str, list[Rows]]
    after: dict[str, list[Rows]]


def rows_of_all(place: Workspace) -> dict[str, list[Rows]]:
    return {
        name: [
            read_rows(place, name, form.table),
            query(place, f"FROM \"{form.table}\" WHERE run_id = '{name}'").to_pylist(),
        ]
        for name, form in BY_NAME.items()
    }


@pytest.fixture(scope="module")
def all_forms(tmp_path_factory: pytest.TempPathFactory) -> Migrated:
    place = Workspace.open(tmp_path_factory.mktemp("older"))
    refs = {name: commit(place, name) for name in BY_NAME}
    for name in BY_NAME:
        commit_rows(place, name, "runs", preset="emoji", config_json=CONFIG)
    rebuild_catalog(place)
    before, digests = rows_of_all(place), {name: artifact_digest(ref) for name, ref in refs.items()}
    found = {file.ref.run_id: file for file in migrate(place)}
    return Migrated(place, refs, digests, found, before, rows_of_all(place))


def test_every_older_version_has_a_step_and_a_frozen_form():
    assert missing_steps() == [], "a version was raised: add a step to storage/migrations.py"
    assert {(form.table, form.version) for form in FORMS} == set(STEPS), "add the form to older_tables.py"


def test_a_version_without_a_step_is_found():
    assert missing_steps({**VERSIONS, "votes": 3, "models": 4}) == [("models", 3), ("votes", 1), ("votes", 2)]


def test_columns_change_with_their_version_only():
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    now = columns_now()
    same_version = [t for t in now if t in recorded and now[t].split()[0] == recorded[t].split()[0]]
    changed = [table for table in same_version if now[table] != recorded[table]]
    assert changed == [], "raise the version in storage/schemas.py, and add a step to storage/migrations.py"
    assert now == recorded, "write the record again: PYTHONPATH=$PWD python tests/storing/older_tables.py"


@pytest.mark.parametrize("form", FORMS, ids=BY_NAME)
def test_what_becomes_of_each_new_column_is_said(form):
    words = explanation(form.table, form.version)
    before = {column.name: column.nullable for column in form.schema()}
    changed = [column.name for column in schema(form.table) if before.get(column.name) != column.nullable]
    assert [name for name in changed if name not in words] == []


@pytest.mark.parametrize("name", BY_NAME)
def test_a_file_of_an_older_version_becomes_todays(all_forms, name, tmp_path):
    form, ref, file = BY_NAME[name], all_forms.refs[name], all_forms.found[name]
    expected = form.rows_now()
    # Readers and the catalog filled in nulls before.
    assert all_forms.before[name] == [without(expected, form)] * 2
    assert all_forms.after[name] == [expected] * 2
    assert (file.ref, file.table, file.version, file.rows) == (ref, form.table, form.version, len(form.rows))
    write_rows(tmp_path, form.table, expected)
    assert (ref.folder / file.name).read_bytes() == (tmp_path / file.name).read_bytes()

    verify(ref)
    manifest = read_manifest(ref)
    assert artifact_digest(ref) == all_forms.digests[name]
    assert manifest.facts.keys() == {"host", "migrations"}
    (record,) = manifest.facts["migrations"]
    assert record["versions"] == {form.table: [form.version, VERSIONS[form.table]]}
    assert left_in_staging(ref) == []


def left_in_staging(ref: ArtifactRef) -> list[Path]:
    staging = ref.folder.parent.parent / STAGING
    return [path for path in staging.rglob("*") if path.is_file() and path.name != "lock"]


def test_nothing_is_left_to_do(all_forms):
    assert len(all_forms.found) == len(FORMS)
    assert old_files(all_forms.place) == rewrite_old_files(all_forms.place) == []


def test_lineage_without_a_configuration_is_null(workspace):
    commit(workspace, "models-1")
    rewrite_old_files(workspace)
    (row,) = read_rows(workspace, "models-1", "models")
    lineage = ("base_model", "base_digest", "config_digest", "data_run_id")
    assert [row[name] for name in lineage] == [None, None, None, "models-1"]


@pytest.mark.parametrize("kill", ["after_stage", "after_manifest", "after_file:1", "after_file:2"])
def test_a_migration_killed_at_any_point_goes_on(workspace, tmp_path, child, kill):
    names = ("disparities-1", "group_shares-1")
    tables = [BY_NAME[name].table for name in names]
    ref = commit(workspace, *names)
    undisturbed = commit(Workspace.open(tmp_path / "undisturbed"), *names)
    digest = artifact_digest(ref)
    point, _, nth = kill.partition(":")
    killed = child(REWRITE, str(workspace.root), POPALIGN_KILL_AT=f"{point}:disparities:{nth or 1}")
    _, stderr = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, stderr

    done = int(nth or 0)
    assert [file.table for file in old_files(workspace)] == tables[done:]
    verify(ref)
    assert artifact_digest(ref) == digest
    for form in (BY_NAME[name] for name in names):
        rows = form.rows_now() if form.table in tables[:done] else without(form.rows_now(), form)
        assert read_artifact(ref, form.table) == rows

    assert [file.table for file in rewrite_old_files(workspace)] == tables[done:]
    rewrite_old_files(Workspace(Path(undisturbed.workspace)))
    for name in (f"{table}.parquet" for table in tables):
        assert (ref.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert read_manifest(ref).files == read_manifest(undisturbed).files
    assert read_manifest(ref).former == read_manifest(undisturbed).former
    assert artifact_digest(ref) == digest
    verify(ref)
    assert {path.name for path in ref.folder.iterdir()} == {MANIFEST, "disparities.parquet", "group_shares.parquet"}
    assert left_in_staging(ref) == []


def test_a_run_in_use_is_named_and_nothing_is_touched(workspace):
    ref = commit(workspace, "timings-1")
    before = (ref.folder / MANIFEST).read_bytes()
    with run_lock(workspace, "working"), pytest.raises(RunInUse, match=r"run 'working' in .* by process"):
        rewrite_old_files(workspace)
    assert len(old_files(workspace)) == 1
    assert (ref.folder / MANIFEST).read_bytes() == before
    assert len(rewrite_old_files(workspace)) == 1


def test_a_newer_version_is_refused_and_nothing_is_touched(workspace):
    commit(workspace, "timings-1")
    newer = commit(workspace, "validations-1")
    path = newer.folder / "validations.parquet"
    known = VERSIONS["validations"]
    marked = pq.read_table(path).replace_schema_metadata({"table": "validations", "version": str(known + 1)})
    pq.write_table(marked, path)
    with pytest.raises(WorkspaceTooNew, match=rf"validations\.parquet has version {known + 1} .* up to {known}"):
        rewrite_old_files(workspace)
    path.unlink()
    assert len(old_files(workspace)) == 1


def test_a_damaged_file_gets_no_sound_manifest(workspace):
    sound = commit(workspace, "models-2")
    damaged = commit(workspace, "timings-1")
    path = damaged.folder / "timings.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.slice(0, 0), path)
    with pytest.raises(CorruptArtifact, match=r"timings\.parquet is not what its manifest says.* was not migrated"):
        rewrite_old_files(workspace)
    assert [file.ref for file in old_files(workspace)] == [damaged]
    verify(sound)


def test_a_file_with_columns_of_nobody_is_refused(workspace):
    ref = ArtifactRef(str(workspace.root), "night-1", "timings", "all")
    with staged_artifact(ref) as folder:
        BY_NAME["timings-1"].write(folder)
        path = folder / "timings.parquet"
        rows = pq.read_table(path)
        pq.write_table(rows.append_column("colour", rows["device"]), path)
    with pytest.raises(SchemaMismatch, match="no column colour"):
        rewrite_old_files(workspace)
    assert len(old_files(workspace)) == 1


def test_a_reader_that_cannot_fill_in_names_the_command(workspace):
    ref = ArtifactRef(str(workspace.root), "night-1", "timings", "all")
    with staged_artifact(ref) as folder:
        BY_NAME["timings-1"].write(folder)
        path = folder / "timings.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["device"]), path)
    with pytest.raises(SchemaMismatch, match=r"column device: a value is missing.*has version 1 .*`popalign migrate`"):
        read_rows(workspace, "night-1", "timings")


def test_a_promoted_model_stays_the_same_model(workspace):
    ref = ArtifactRef(str(workspace.root), "night-1", "models", "round-1")
    with staged_artifact(ref) as folder:
        BY_NAME["models-1"].write(folder)
        (folder / "lora").mkdir()
        (folder / "lora" / "weights.safetensors").write_bytes(b"weights")
    weights = ref.folder / "lora" / "weights.safetensors"
    entry, inode = model_entry(workspace, "night-1", "round-1"), weights.stat().st_ino
    assert set_current(workspace, entry, by="test", reason="r") is not None
    rewrite_old_files(workspace)
    require_weights(workspace, entry)
    assert set_current(workspace, model_entry(workspace, "night-1", "round-1"), by="test", reason="r") is None
    assert weights.stat().st_ino == inode, "weights were copied"
    verify(ref)


def test_the_age_of_a_run_stays(workspace):
    """`popalign gc` counts it from the manifests."""
    path = commit(workspace, "timings-1").folder / MANIFEST
    os.utime(path, (1_000_000, 1_000_000))
    rewrite_old_files(workspace)
    assert path.stat().st_mtime == 1_000_000


def test_equal_rows_may_be_committed_again_afterwards(workspace):
    ref = commit(workspace, "group_shares-1")
    rewrite_old_files(workspace)
    with staged_artifact(ref) as folder:
        write_rows(folder, "group_shares", BY_NAME["group_shares-1"].rows_now())


def test_copies_for_queries_are_made_again(workspace):
    commit_copied_run(workspace)
    (before,) = compact(workspace)
    migrate(workspace)
    rows = query(workspace, "FROM group_shares").to_pylist()
    assert [row["interval"] for row in rows] == ["wilson"] * 2 * FEWEST_FILES
    (after,) = compaction.current_segments(workspace)
    assert after.name != before.name


def test_copies_made_before_are_stale_even_if_the_rest_is_killed(workspace, child):
    commit_copied_run(workspace)
    assert len(compact(workspace)) == 1
    killed = child(REWRITE, str(workspace.root), POPALIGN_KILL_AT="after_file:disparities:3")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert compaction.current_segments(workspace) == []


def test_the_command_lists_then_rewrites_then_has_nothing_to_do(workspace):
    def answer(*options: str) -> str:
        result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["migrate", "-w", str(workspace.root), *options])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    commit(workspace, "group_shares-1", "disparities-1")
    commit(workspace, "timings-1")
    listed = answer()
    assert "disparities │ 1 -> 2 │ 1 │ 2 │" in listed
    assert "nothing was touched: the same with --yes rewrites 3 files of 2 runs" in listed
    assert len(old_files(workspace)) == 3
    assert f"3 files of 2 runs rewritten in {workspace.root}" in answer("--yes")
    nothing = f"nothing to do: every table in {workspace.root} has its current version"
    assert answer() == answer("--yes") == nothing


def test_the_command_makes_no_workspace(tmp_path):
    result = CliRunner().invoke(app, ["migrate", "-w", str(tmp_path / "typo")])
    assert "there is no workspace at" in str(result.exception)
    assert not (tmp_path / "typo").exists()
