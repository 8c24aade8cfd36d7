"""The whole pipeline on the embedded model, cut to a few images and steps: does every stage do its work, once?"""

import json
import re
from collections.abc import Generator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.debias import debias
from flows.nightly import nightly
from flows.outcome import HELD, QUALITY_GATE_FAILED, summary_of
from flows.sampler_comparison import sampler_comparison
from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from storage.artifacts import artifact_digest, committed_keys, verify
from storage.catalog import query, rebuild_catalog
from storage.layout import Workspace
from storage.registry import current_model
from storage.schemas import TABLES
from storage.tables import FOLDER

SETTINGS = {
    "expansion.axes": "perceived_gender",
    "expansion.max_subjects": "2",
    "sampling.steps": "4",
    "sampling.batch_size": "16",
    "sampling.shard_size": "32",
    "images.train_neutral": "16",
    "images.validation": "3",
    "images.evaluation": "4",
    "images.trained": "2",
    "images.obedience": "1",
    "populations.weighting": "even",
    "alignment.rounds": "1",
    "alignment.steps": "2",
    "alignment.pairs_per_step": "4",
    "assessment.resamples": "200",
}
RUN = "tiny"


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return with_settings(preset("emoji"), SETTINGS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Generator[Workspace]:
    root = tmp_path_factory.mktemp("workspace")
    with (
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        prefect_test_harness(server_startup_timeout=180),
    ):
        debias(RUN, "emoji", config=config, workspace=str(root), return_state=True)
        yield Workspace.open(root)


def digests(place: Workspace) -> dict[str, str]:
    refs = [ref for table in TABLES if table not in FOLDER for ref in committed_keys(place, RUN, table)]
    return {f"{ref.table}/{ref.key}": artifact_digest(ref) for ref in refs if ref.table not in ("starts", "timings")}


def files(place: Workspace) -> dict[Path, int]:
    """All but the record of starts, which grows with each."""
    paths = [path for path in place.runs.rglob("*.parquet") if path.name != "starts.parquet"]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.timeout(600)
def test_every_stage_commits_its_tables(place: Workspace) -> None:
    empty = [name for name in TABLES if query(place, f"SELECT * FROM {name}").num_rows == 0]
    assert set(empty) <= {"refusals", "sampler_comparisons"}
    for table in TABLES:
        for ref in committed_keys(place, RUN, table):
            verify(ref)


def test_no_image_is_dropped(place: Workspace) -> None:
    missing = query(
        place,
        """SELECT count(*) AS n FROM samples s
        WHERE NOT EXISTS (FROM attributes a WHERE a.sample_id = s.sample_id AND a.axis = 'perceived_gender')""",
    )
    assert missing.to_pylist() == [{"n": 0}]


def test_specific_images_share_their_noise_with_neutral_ones(place: Workspace) -> None:
    shared = query(
        place,
        """WITH drawn AS (SELECT kind, split, seed FROM samples JOIN prompts USING (run_id, prompt_id))
        SELECT bool_and(seed IN (SELECT seed FROM drawn WHERE kind = 'neutral')) AS all_shared
        FROM drawn WHERE kind = 'specific' AND split = 'train'""",
    )
    assert shared.to_pylist() == [{"all_shared": True}]


def test_the_decision_names_its_checks_and_the_report_stands_alone(place: Workspace) -> None:
    decision = query(place, "SELECT verdict, reason, len(checks) AS checks FROM decisions").to_pylist()[0]
    assert decision["verdict"] in ("promote", "hold")
    assert decision["checks"] == 4
    page = (place.run_folder(RUN) / "report.html").read_text()
    assert decision["reason"].split(",")[0][:20] in page
    assert "data:image/webp;base64," in page
    assert 'src="http' not in page


def first_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
    return min((run for run in runs if run.name == f"debias {RUN}"), key=lambda run: run.created)


def test_a_model_that_is_held_is_no_green_run(place: Workspace) -> None:
    decision = query(place, "SELECT verdict, reason FROM decisions").to_pylist()[0]
    assert decision["verdict"] == "hold"  # two steps of training reduce nothing
    state = first_run().state
    assert state is not None
    assert state.is_failed()
    assert state.name in (HELD, QUALITY_GATE_FAILED)
    assert decision["reason"] in str(state.message)


@pytest.mark.usefixtures("place")
def test_the_run_can_be_found_by_preset_and_model() -> None:
    assert {"preset:emoji", "model:emoji"} <= set(first_run().tags)


@pytest.mark.usefixtures("place")
def test_the_run_page_shows_decision_table_and_images() -> None:
    with get_client(sync_client=True) as client:
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first_run().id]))
        found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=mine)}
    summary, table = found[f"popalign-{RUN}-summary"].data, found[f"popalign-{RUN}-disparities"].data
    assert summary.count("data:image/webp;base64,") == 2
    assert len(summary) < 1_000_000
    assert "report.html" in summary
    rows = json.loads(table)
    assert {row["model"] for row in rows} == {"base", "round-1"}
    assert all(row["n"] and row["95% interval"] and row["judge"] for row in rows)
    assert any(row["sampling floor"] for row in rows)


@pytest.mark.usefixtures("place")
def test_progress_says_how_much_how_fast() -> None:
    with get_client(sync_client=True) as client:
        progress = [artifact for artifact in client.read_artifacts() if artifact.type == "progress"]
    sampling = [artifact for artifact in progress if "sampling base evaluation" in str(artifact.description)]
    assert len(sampling) == 1
    assert float(sampling[0].data) == 100
    assert "8 of 8 images" in str(sampling[0].description)
    assert "/s" in str(sampling[0].description)


def test_calling_it_again_draws_nothing_and_changes_nothing(place: Workspace, config: RunConfig) -> None:
    before = digests(place)
    written = files(place)
    summary = summary_of(debias(RUN, "emoji", config=config, workspace=str(place.root), return_state=True))
    assert digests(place) == before
    assert files(place) == written
    assert Path(summary.report).is_file()
    assert json.loads(query(place, "SELECT config_json FROM runs").to_pylist()[0]["config_json"])["seed"] == 0


@pytest.mark.timeout(600)
def test_a_night_is_named_by_its_date_and_shows_what_became_of_it(place: Workspace) -> None:
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    state = nightly(
        "emoji", start_from="current", promote=True, settings=settings, workspace=str(place.root), return_state=True
    )
    assert state.name in (HELD, QUALITY_GATE_FAILED)
    (night,) = [run_id for run_id in place.run_ids() if run_id != RUN]
    assert re.fullmatch(r"nightly-emoji-\d{8}", night)
    # The same settings and seed: the same images as in the run before.
    same = query(
        place,
        f"""SELECT count(*) AS n, count(DISTINCT image_sha256) AS different FROM samples
        WHERE model_id = 'base' AND run_id IN ('{RUN}', '{night}') GROUP BY sample_id""",
    ).to_pylist()
    assert {(row["n"], row["different"]) for row in same} == {(2, 1)}
    assert current_model(place) is None  # held, so not promoted


@pytest.mark.timeout(600)
def test_a_fast_sampler_is_compared_with_the_images_of_a_finished_run(place: Workspace) -> None:
    drawn = query(place, "SELECT count(*) AS n FROM samples").to_pylist()
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    changes = [*settings, "sampling.approximate.steps=2", "sampling.approximate.cache_every=2"]
    summary = sampler_comparison("fast", "emoji", changes, exact_run_id=RUN, workspace=str(place.root))
    assert (summary.exact_run_id, summary.fast_run_id) == (RUN, "fast-fast")
    assert summary.approximations == ("steps: 2 instead of 4", "inner UNet computed every 2 steps")
    assert summary.speed is not None
    assert Path(summary.sheet).is_file()
    rebuild_catalog(place)
    rows = query(place, "SELECT * FROM sampler_comparisons").to_pylist()
    assert {row["role"] for row in rows} == {"judge", "builder"}
    assert len({row["exact_fingerprint"] for row in rows} | {row["fast_fingerprint"] for row in rows}) == 2
    assert {row["n"] + row["unknown"] for row in rows} == {8}
    # The fast images, and none of the exact ones again.
    assert query(place, "SELECT count(*) AS n FROM samples").to_pylist()[0]["n"] == drawn[0]["n"] + 8
    written = files(place)
    again = sampler_comparison("fast", "emoji", changes, exact_run_id=RUN, workspace=str(place.root))
    assert again == summary
    assert files(place) == written
