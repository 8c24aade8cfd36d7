"""Scorers of image quality over a run's stored images: what is committed, compared, and decided."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_scorers import dino_folder

from popalign_core.config import with_settings
from popalign_core.detection import Box
from storage.tables import read_artifact
from tasks import stored_shard
from tasks.assessment import assess
from tasks.inputs import check_inputs
from tasks.quality import missing_scores, score_shard
from tasks.run import BASE, reference

MODEL = "round-1"


def label(row) -> str:
    return "man" if row["sample_index"] % 4 else "woman"


@pytest.fixture
def scored_run(written_run, tmp_path: Path):
    """Both models drew the same pictures of noise, scored by the builder's own model and by a tiny DINOv2."""
    scorers = f"hps=emoji-clip,dinov2={dino_folder(tmp_path / 'dino')}"
    run = replace(written_run, config=with_settings(written_run.config, {"quality.scorers": scorers}))
    for model in (BASE, MODEL):
        for role in ("judge", "builder"):
            run.commit_labels(run.commit_samples(model, "evaluation"), role, label)
        run.commit_labels(run.commit_samples(model, "obedience"), "judge", lambda _: "man")
    return run


def test_every_image_has_a_score_in_its_group_and_the_decision_reads_it(scored_run) -> None:
    run = scored_run
    check_inputs(run.config)
    for ref in missing_scores(run.workspace, run.run_id, run.config, MODEL):
        score_shard.fn(ref, run.config)
    assert missing_scores(run.workspace, run.run_id, run.config, MODEL) == []
    ref = assess.fn(run.workspace, run.run_id, run.config, MODEL)

    rows = read_artifact(ref, "scores")
    clip, hps = (
        [row["value"] for row in rows if row["measure"] == measure and row["model_id"] == BASE]
        for measure in ("clip_score", "hps")
    )
    assert hps == pytest.approx(clip, rel=1e-4)  # the same model: 100 x cosine both times

    groups = {
        (row["axis"], row["group"]): row
        for row in read_artifact(ref, "group_scores")
        if row["measure"] == "hps" and row["model_id"] == BASE
    }
    by_group = [groups["perceived_gender", name] for name in ("woman", "man")]
    assert [row["n"] for row in by_group] == [4, 12]
    assert np.average([row["value"] for row in by_group], weights=[4, 12]) == pytest.approx(hps[0])
    assert {row["scorer_id"].partition("@")[0] for row in by_group} == {"hps:emoji-clip"}

    (gap,) = [
        row
        for row in read_artifact(ref, "group_gaps")
        if (row["measure"], row["model_id"], row["axis"]) == ("hps", BASE, "perceived_gender")
    ]
    means = sorted(row["value"] for row in by_group)
    assert (gap["group_min"], gap["group_max"]) == tuple(means)
    assert (gap["difference"], gap["ratio"]) == pytest.approx((means[1] - means[0], means[0] / means[1]))
    assert (gap["overall"], gap["n"], gap["groups"], gap["unknown"]) == (pytest.approx(hps[0]), 16, 2, 0)
    assert gap["null_high"] > 0

    distances = {
        row["group"]: row
        for row in read_artifact(ref, "group_distances")
        if row["measure"] == "fd_dinov2" and row["axis"] == "perceived_gender"
    }
    assert [(distances[name]["n_base"], distances[name]["n_aligned"]) for name in ("woman", "man")] == [
        (4, 4),
        (12, 12),
    ]
    assert distances["man"]["value"] == pytest.approx(0.0, abs=1e-4)

    (distance,) = [row for row in read_artifact(ref, "distances") if row["measure"] == "fd_dinov2"]
    assert (distance["value"], distance["n"]) == (pytest.approx(0.0, abs=1e-4), 16)

    (decision,) = read_artifact(reference(run.workspace, run.run_id, "decisions", MODEL), "decisions")
    (check,) = [check for check in decision["checks"] if check["name"] == "hps_quality_drop"]
    assert (check["passed"], check["value"], check["threshold"]) == (True, 0.0, 0.2)


class HalfPerson:
    """Finds somebody in the left half of all pictures but every fourth."""

    detector_id = "detector:written-down@0"

    def find(self, images: np.ndarray) -> list[list[Box]]:
        return [[Box(0, 0, 32, 64, 0.9)] if position % 4 else [] for position in range(len(images))]


def test_outside_of_persons_the_same_pictures_differ_by_nothing(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_shard, "detector", lambda *_: HalfPerson())
    run = replace(written_run, config=with_settings(written_run.config, {"detection.persons": "written/down"}))
    for model in (BASE, MODEL):
        for role in ("judge", "builder"):
            samples = run.commit_samples(model, "evaluation")
            run.commit_labels(samples, role, label if model == MODEL else lambda _: "man")
        run.commit_labels(run.commit_samples(model, "obedience"), "judge", lambda _: "man")
    ref = assess.fn(run.workspace, run.run_id, run.config, MODEL)
    rows = {row["changed"]: row for row in read_artifact(ref, "entanglements") if row["split"] == "eval"}
    # A woman where the index is a multiple of 4: just where nobody is found, so that no pair is left.
    assert (rows[True]["value"], rows[True]["n"], rows[True]["left_out"]) == (None, 0, 4)
    assert (rows[False]["value"], rows[False]["n"], rows[False]["left_out"]) == (0.0, 12, 4)
