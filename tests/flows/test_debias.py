"""The whole pipeline on the embedded model, cut to a few images and steps: does every stage do its work, once?"""

import json
import re
import runpy
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest
from plain_run import BESIDE_A_PLAIN_RUN
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.debias import debias
from flows.nightly import nightly
from flows.outcome import HELD, QUALITY_GATE_FAILED, summary_of
from flows.sampler_comparison import sampler_comparison
from popalign_core.assessment.uncertainty import wilson_interval
from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from storage.artifacts import artifact_digest, committed_keys, verify
from storage.catalog import query, rebuild_catalog
from storage.images import decode_image
from storage.layout import Workspace
from storage.registry import current_model
from storage.schemas import TABLES
from storage.tables import FOLDER, read_rows

SETTINGS = {
    "expansion.axes": "perceived_gender",
    "expansion.max_subjects": "2",
    "sampling.steps": "4",
    "sampling.batch_size": "8",
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
    assert set(empty) == BESIDE_A_PLAIN_RUN | {"refusals"}
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


def test_every_question_of_the_documentation_has_an_answer(place: Workspace) -> None:
    text = (Path(__file__).parents[2] / "docs" / "queries.md").read_text()
    questions = re.findall(r"\*\*(\d+)\. .*?```sql\n(.*?)```", text, re.DOTALL)
    assert [int(number) for number, _ in questions] == list(range(1, 24))
    rows = {number: query(place, sql.replace("demo-0", RUN)).num_rows for number, sql in questions}
    # What is not there in this run: groups that never occur, unknown images, refusals.
    assert {number for number, count in rows.items() if not count} <= {"6", "10", "17"}


def test_the_notebook_draws_the_run(place: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POPALIGN_WORKSPACE", str(place.root))
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "notebook.py"))
    _, seen = found["app"].run()
    assert {row["measure"] for row in seen["before_after"]} >= {"l2", "clip_score"}
    assert [len(figure.axes) for figure in seen["shares"]] == [2]
    assert all(images for *_, images in seen["gallery"])
    assert {row["stage"] for row in seen["cost"]} >= {"sampling", "alignment"}


def test_macros_give_the_numbers_of_the_tables(place: Workspace) -> None:
    (decision,) = read_rows(place, RUN, "decisions")
    base, model = decision["base_model_id"], decision["model_id"]
    prompts = {row["prompt_id"]: row for row in read_rows(place, RUN, "prompts")}
    attributes = [row for row in read_rows(place, RUN, "attributes") if row["status"] == "ok"]
    neutral = [row for row in attributes if prompts[row["prompt_id"]]["kind"] == "neutral"]

    judge = next(row["judge_id"] for row in read_rows(place, RUN, "group_shares"))
    seen = Counter(
        row["label"]
        for row in neutral
        if row["model_id"] == base and row["classifier_id"] == judge and prompts[row["prompt_id"]]["split"] == "eval"
    )
    heard = f"split = 'eval' AND classifier_id = '{judge}'"
    cells = query(place, f"FROM cells('{RUN}', '{base}') WHERE {heard}").to_pylist()
    assert {row["cell"]: row["count"] for row in cells} == {group: seen[group] for group in ("man", "woman")}
    pooled = query(place, f"FROM shares('{RUN}', '{base}') WHERE split = 'eval' AND subject IS NULL").to_pylist()
    for cell in cells:
        (share,) = [row for row in pooled if row["group"] == cell["cell"]]
        assert cell["share"] == pytest.approx(share["share"])
        assert [cell[end] for end in ("low", "high")] == pytest.approx(wilson_interval(cell["count"], cell["n"]))
        assert share["floor"] == pytest.approx((0.5 / share["n"]) ** 0.5)

    by_group = {
        (row["axis"], row["measure"], row["group"]): row
        for row in query(place, f"FROM by_group('{RUN}', '{base}')").to_pylist()
    }
    stored = [row for row in read_rows(place, RUN, "group_scores") if row["split"] == "eval"]
    assert {key: row["value"] for key, row in by_group.items() if key[1] == "clip_score"} == {
        (row["axis"], row["measure"], row["group"]): row["value"] for row in stored if row["model_id"] == base
    }
    assert {key[1] for key in by_group} == {"share", "clip_score", "vendi_score"}
    gaps = query(place, f"FROM gaps('{RUN}')").to_pylist()
    assert [(row["measure"], row["which"]) for row in gaps] == [("clip_score", "before"), ("clip_score", "after")]
    means = [row["value"] for row in by_group.values() if row["measure"] == "clip_score" and row["value"] is not None]
    assert (gaps[0]["group_min"], gaps[0]["group_max"]) == (min(means), max(means))

    before, after = (
        {
            row["sample_id"].split("/", 1)[1]: row["label"]
            for row in neutral
            if row["model_id"] == one and row["classifier_id"] == judge
        }
        for one in (base, model)
    )
    flips = query(place, f"FROM flips('{RUN}') WHERE classifier_id = '{judge}'").to_pylist()
    changes = Counter((before[image], after[image]) for image in before.keys() & after.keys())
    assert {
        pair: sum(row["images"] for row in flips if (row["label_before"], row["label_after"]) == pair)
        for pair in changes
    } == changes
    worst = query(place, f"FROM worst_prompts('{RUN}', '{base}', top := 1)").to_pylist()
    found = query(
        place, f"FROM images_behind('{RUN}', '{base}', '{worst[0]['prompt_id']}', '{worst[0]['axis']}')"
    ).to_pylist()
    assert sum(row["status"] == "ok" for row in found) == worst[0]["n"]
    assert decode_image(found[0]["image"]).shape == (64, 64, 3)


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
