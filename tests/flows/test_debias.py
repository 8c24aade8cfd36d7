"""The whole pipeline on the embedded model, cut to a few images and steps: does every stage do its work, once?"""

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.debias import debias
from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from storage.artifacts import artifact_digest, committed_keys, verify
from storage.catalog import query
from storage.layout import Workspace
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
        debias(RUN, "emoji", str(root), config)
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
    assert set(empty) <= {"refusals"}
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


def test_calling_it_again_draws_nothing_and_changes_nothing(place: Workspace, config: RunConfig) -> None:
    before = digests(place)
    written = files(place)
    summary = debias(RUN, "emoji", str(place.root), config)
    assert digests(place) == before
    assert files(place) == written
    assert Path(summary.report).is_file()
    assert json.loads(query(place, "SELECT config_json FROM runs").to_pylist()[0]["config_json"])["seed"] == 0
