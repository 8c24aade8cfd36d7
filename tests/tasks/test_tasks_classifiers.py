"""Faces and persons, stored vectors, further axes and the agreement of two classifiers, over committed shards."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from popalign_core.attributes import AXES
from popalign_core.classification import Status
from popalign_core.config import with_settings
from popalign_core.detection import Box
from popalign_core.errors import InvalidInput
from popalign_core.phrases import described, described_axis
from storage.artifacts import is_committed
from storage.embeddings import read_embeddings
from storage.errors import NotCommitted
from storage.images import decode_images
from storage.layout import Workspace
from storage.tables import read_artifact, read_rows
from tasks import stored_shard
from tasks.agreement import Classified
from tasks.axes import add_axis, classify_by_embeddings
from tasks.classification import attributes_of, classify_shard
from tasks.run import BASE, reference
from tasks.stored_shard import StoredShard, embeddings_of

AXIS, OTHER = "perceived_gender", "perceived_skin_tone"
PURPOSE = "evaluation"
SAID = ("sample_id", "axis", "label", "confidence", "probabilities", "status", "classifier_id")
# By image, in turn: nobody, one person, three of different sizes.
BOXES = ([], [Box(8, 8, 40, 60, 0.9)], [Box(0, 0, 10, 10, 0.8), Box(20, 4, 60, 60, 0.7), Box(2, 30, 18, 62, 0.6)])


def said(ref) -> list[dict]:
    return [{name: row[name] for name in SAID} for row in read_artifact(ref, "attributes")]


def test_an_axis_from_stored_vectors_is_the_axis_from_images(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    classify_shard.fn(attributes_of(samples, "builder"), written_run.config)
    (samples.folder / "images.parquet").unlink()
    found = said(classify_by_embeddings(samples, written_run.config, described(AXES[OTHER])))

    other = with_settings(written_run.config, {"expansion.axes": OTHER})
    from_images = type(written_run)(written_run.workspace, "again", other)
    again = reference(from_images.workspace, "again", "samples", samples.key)
    again.folder.parent.mkdir(parents=True)
    written_run.commit_samples(BASE, "validation")  # another shard of the first run changes nothing
    _copy_samples(written_run, from_images)
    expected = said(classify_shard.fn(attributes_of(again, "builder"), other))
    assert found == expected
    assert {row["axis"] for row in found} == {OTHER}


def _copy_samples(source, target) -> None:
    from prefect.logging import disable_run_logger

    from tasks.expansion import write_prompts

    with disable_run_logger():
        write_prompts.fn(target.workspace, target.run_id, source.config.expansion)
    type(source)(target.workspace, target.run_id, source.config).commit_samples(BASE, PURPOSE)


def test_vectors_are_stored_once_in_the_order_of_the_images(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    classify_shard.fn(attributes_of(samples, "builder"), written_run.config)
    found = read_embeddings(embeddings_of(samples))
    assert found.sample_ids == [row["sample_id"] for row in read_artifact(samples, "samples")]
    assert set(found.regions) == {0}
    assert found.vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    seen = stored_shard.builder(written_run.config.classification, "cpu")
    assert found.embedder_id == seen.classifier_id
    images = StoredShard(samples, written_run.config).images
    assert np.array_equal(found.vectors, seen.image_features(images).numpy())


def test_evaluated_images_are_decoded_once_for_both_classifiers(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []

    def counting(stored: Sequence[bytes]) -> np.ndarray:
        decoded.append(len(stored))
        return decode_images(stored)

    monkeypatch.setattr(stored_shard, "decode_images", counting)
    samples = written_run.commit_samples(BASE, PURPOSE)
    for role in ("judge", "builder"):
        classify_shard.fn(attributes_of(samples, role), written_run.config)
    assert decoded == [len(read_artifact(samples, "samples"))]
    # The judge of obedience needs nothing of the builder's model.
    others = written_run.commit_samples(BASE, "obedience")
    classify_shard.fn(attributes_of(others, "judge"), written_run.config)
    assert not is_committed(embeddings_of(others))


def test_vectors_of_another_builder_are_refused(written_run) -> None:
    """As after a stop between vectors and labels, and a start with the builder's folder changed."""
    samples = written_run.commit_samples(BASE, PURPOSE)
    classify_shard.fn(attributes_of(samples, "judge"), written_run.config)
    changed = with_settings(written_run.config, {"classification.dtype": "bfloat16"})
    with pytest.raises(InvalidInput, match=r"are of open_clip:emoji-clip@\w+, and the builder is now .*\+bfloat16"):
        classify_shard.fn(attributes_of(samples, "builder"), changed)


def test_embedding_is_a_stage_of_its_own_in_the_timings(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    for role in ("judge", "builder"):
        classify_shard.fn(attributes_of(samples, role), written_run.config)
    timings = read_rows(Workspace.open(written_run.workspace), written_run.run_id, "timings")
    images = len(read_artifact(samples, "samples"))
    assert {(row["stage"], row["key"], row["items"]) for row in timings if row["stage"] != "sampling"} == {
        ("embedding", f"embeddings/{samples.key}", images),
        ("classification", f"attributes/{samples.key}.judge", images),
        ("classification", f"attributes/{samples.key}.builder", images),
    }


def test_the_number_format_stands_in_every_row(written_run) -> None:
    config = with_settings(written_run.config, {"classification.dtype": "bfloat16"})
    samples = written_run.commit_samples(BASE, PURPOSE)
    for role in ("judge", "builder"):
        rows = said(classify_shard.fn(attributes_of(samples, role), config))
        assert {row["classifier_id"].rpartition("+")[2] for row in rows} == {"bfloat16"}
    assert read_embeddings(embeddings_of(samples)).embedder_id.endswith("+bfloat16")


def test_a_run_gets_an_axis_of_a_users_own(written_run, tmp_path: Path) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    classify_shard.fn(attributes_of(samples, "builder"), written_run.config)
    place, run = written_run.workspace, written_run.run_id
    file = tmp_path / "hats.json"
    file.write_text(json.dumps({"name": "perceived_hat", "groups": {"hat": ["a hat"], "none": ["a bare head"]}}))
    axis = described_axis(str(file))
    found = add_axis(place, run, written_run.config, axis)
    assert found == add_axis(place, run, written_run.config, axis)
    ((model, value, floor, n, unknown),) = found.disparities
    rows = read_artifact(attributes_of(samples, f"builder.perceived_hat-{axis.digest}"), "attributes")
    assert (model, int(n) + int(unknown)) == (BASE, len(rows))
    assert "[" in value
    assert floor
    assert found.classifier_id.endswith(axis.digest)
    assert {row["classifier_id"] for row in rows} == {found.classifier_id}
    assert sum(int(count) for _, _, count, _ in found.shares) == int(n)
    with pytest.raises(InvalidInput, match="was made with perceived_gender"):
        add_axis(place, run, written_run.config, described(AXES[AXIS]))


def test_without_vectors_no_axis_can_be_added(written_run) -> None:
    with pytest.raises(NotCommitted, match="no embeddings yet"):
        add_axis(written_run.workspace, written_run.run_id, written_run.config, described(AXES[OTHER]))


class CountingDetector:
    detector_id = "detector:written-down@0"

    def __init__(self) -> None:
        self.calls = 0

    def find(self, images: np.ndarray) -> list[list[Box]]:
        self.calls += 1
        return [list(BOXES[position % len(BOXES)]) for position in range(len(images))]


@pytest.mark.parametrize("several", ["largest", "none"])
def test_outcomes_of_detection_stand_in_the_tables(written_run, monkeypatch: pytest.MonkeyPatch, several: str) -> None:
    found = CountingDetector()
    monkeypatch.setattr(stored_shard, "detector", lambda *_: found)
    settings = {"detection.persons": "written/down", "detection.several": several, "classification.min_confidence": "0"}
    config = with_settings(written_run.config, settings)
    samples = written_run.commit_samples(BASE, PURPOSE)
    ids = [row["sample_id"] for row in read_artifact(samples, "samples")]
    refs = {role: classify_shard.fn(attributes_of(samples, role), config) for role in ("judge", "builder")}
    assert found.calls == 1

    boxes = read_artifact(reference(samples.workspace, samples.run_id, "detections", samples.key), "detections")
    assert Counter(row["sample_id"] for row in boxes) == {
        sample: len(BOXES[position % 3]) for position, sample in enumerate(ids) if BOXES[position % 3]
    }
    largest = [(row["left"], row["top"]) for row in boxes if row["sample_id"] == ids[2] and row["region"] == 1]
    assert largest == [(20, 4)]
    for role, ref in refs.items():
        status = {row["sample_id"]: row["status"] for row in read_artifact(ref, "attributes")}
        assert [status[sample] for sample in ids[0::3]] == [Status.NO_PERSON] * len(ids[0::3])
        regions = read_artifact(ref, "region_attributes")
        assert Counter(row["sample_id"] for row in regions) == Counter(row["sample_id"] for row in boxes), role
        first = {row["sample_id"]: row for row in regions if row["region"] == 1}
        for position, sample in enumerate(ids):
            if position % 3 == 1 or (position % 3 == 2 and several == "largest"):
                assert status[sample] == first[sample]["status"]
            elif position % 3 == 2:
                assert status[sample] == Status.SEVERAL
    vectors = read_embeddings(embeddings_of(samples))
    assert vectors.of_whole_images.shape[0] == len(ids)
    assert len(vectors.regions) == len(ids) + len(boxes)


def test_agreement_and_statuses_are_counted_by_hand(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)  # eight images for each of two prompts
    written_run.commit_labels(samples, "judge", lambda row: ("man", "woman", None)[row["sample_index"] % 3])
    written_run.commit_labels(samples, "builder", lambda row: ("man", "man", "man")[row["sample_index"] % 3])
    ids = {"judge": "j", "builder": "b"}
    images = Classified(written_run.workspace, written_run.run_id, written_run.config, BASE, PURPOSE, ids)
    rows = {row["measure"]: row for row in images.agreement_rows("eval")}
    # Indices 0 to 7: man 0, 3, 6; woman 1, 4, 7; unknown 2, 5.
    assert rows["observed_agreement"]["value"] == pytest.approx(6 / 12)
    assert rows["cohen_kappa"]["value"] == pytest.approx(0.0)
    for row in rows.values():
        assert (row["n"], row["unknown"], row["judge_id"], row["builder_id"]) == (12, 4, "j", "b")
        assert row["low"] <= row["value"] <= row["high"]
    counts = {row["status"]: (row["count"], row["n"]) for row in images.status_rows("eval", "judge")}
    assert counts == dict.fromkeys(map(str, Status), (0, 16)) | {"ok": (12, 16), "low_confidence": (4, 16)}
