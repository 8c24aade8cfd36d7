"""Prompts, images and attributes of one shard, by the embedded models."""

import asyncio
import hashlib
from collections import Counter

import numpy as np
import pytest
from prefect.states import Failed

from popalign_core.attributes import AXES
from popalign_core.classification import Status
from popalign_core.config import with_settings
from popalign_core.errors import InvalidInput
from storage.artifacts import artifact_digest, is_committed
from storage.errors import NotCommitted, StorageFull
from storage.images import decode_image
from storage.tables import read_artifact
from tasks import shard_writing
from tasks.classification import TooManyUnclassified, attributes_of, check_classified, classify_shard
from tasks.expansion import write_prompts
from tasks.run import BASE, read_prompts, reference
from tasks.sampling import images_missing, plan_shards, sample_shard

AXIS = "perceived_gender"
PURPOSE = "evaluation"


def shards_of(run, shard_size: int) -> tuple:
    config = with_settings(run.config, {"sampling.shard_size": str(shard_size)})
    return config, plan_shards(run.workspace, run.run_id, config, BASE, PURPOSE)


def test_prompts_cross_every_subject_with_every_group(written_run) -> None:
    prompts = read_prompts(written_run.workspace, written_run.run_id)
    assert Counter((p.split, p.kind) for p in prompts) == {
        (split, kind): 2 * count
        for split in ("train", "validation", "eval")
        for kind, count in (("neutral", 1), ("specific", len(AXES[AXIS].groups)))
    }
    again = write_prompts.fn(written_run.workspace, written_run.run_id, written_run.config.expansion)
    assert len(read_artifact(again, "prompts")) == len(prompts)


def test_an_image_does_not_depend_on_its_shard(written_run) -> None:
    images: list[dict[str, bytes]] = []
    for shard_size in (16, 5):
        config, shards = shards_of(written_run, shard_size)
        # The second time in another run, which shares the seeds because they do not name it.
        shards = [reference(ref.workspace, f"{ref.run_id}-{shard_size}", ref.table, ref.key) for ref in shards]
        write_prompts.fn(written_run.workspace, shards[0].run_id, config.expansion)
        drawn = [row for ref in shards for row in read_artifact(sample_shard.fn(ref, config), "images")]
        images.append({row["sample_id"]: row["image"] for row in drawn})
    assert len(images[0]) == 16
    assert images[0] == images[1]


def test_rows_name_what_was_stored(written_run) -> None:
    config, (ref,) = shards_of(written_run, 16)
    assert images_missing([ref], config) == 16
    sample_shard.fn(ref, config)
    assert images_missing([ref], config) == 0
    stored = {row["sample_id"]: row["image"] for row in read_artifact(ref, "images")}
    for row in read_artifact(ref, "samples"):
        assert row["image_sha256"] == hashlib.sha256(stored[row["sample_id"]]).hexdigest()
        assert decode_image(stored[row["sample_id"]]).shape == (row["height"], row["width"], 3)
    digest = artifact_digest(ref)
    assert artifact_digest(sample_shard.fn(ref, config)) == digest


def test_a_shard_that_fails_commits_nothing(written_run, monkeypatch: pytest.MonkeyPatch) -> None:
    config, (ref,) = shards_of(written_run, 16)

    def full(_: np.ndarray) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writing, "encode_image", full)
    with pytest.raises(StorageFull, match="No space left"):
        sample_shard.fn(ref, config)
    assert not is_committed(ref)


@pytest.mark.parametrize(("error", "again"), [(OSError(28, "No space left"), True), (InvalidInput("no"), False)])
def test_only_input_and_output_is_tried_again(error: Exception, again: bool) -> None:
    assert asyncio.run(sample_shard.retry_condition_fn(sample_shard, None, Failed(data=error))) is again


@pytest.mark.parametrize("role", ["builder", "judge"])
def test_every_image_gets_one_row_an_axis(written_run, role: str) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    rows = read_artifact(classify_shard.fn(attributes_of(samples, role), written_run.config), "attributes")
    wanted = [row["sample_id"] for row in read_artifact(samples, "samples")]
    assert [row["sample_id"] for row in rows] == wanted
    assert {row["axis"] for row in rows} == {AXIS}
    assert len({row["classifier_id"] for row in rows}) == 1
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1.0, abs=1e-5)
        assert row["status"] in set(Status)
        assert row["label"] is not None or row["status"] == Status.NO_PERSON


def test_samples_without_their_image_are_refused(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    (samples.folder / "images.parquet").unlink()
    with pytest.raises(NotCommitted, match="no committed images"):
        classify_shard.fn(attributes_of(samples, "builder"), written_run.config)


def test_a_base_model_that_cannot_be_read_stops_the_run(written_run) -> None:
    samples = written_run.commit_samples(BASE, PURPOSE)
    written_run.commit_labels(samples, "builder", lambda row: "man" if row["sample_index"] < 3 else None)
    with pytest.raises(TooManyUnclassified, match=r"10 of 16 images have no known perceived_gender"):
        check_classified([samples], "builder", written_run.config)
    generous = with_settings(written_run.config, {"classification.max_unclassified": "0.7"})
    check_classified([samples], "builder", generous)
