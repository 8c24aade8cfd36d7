"""Images keep every pixel, and few of them are read without the others."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import CorruptArtifact, SchemaMismatch
from storage.images import FORMAT, decode_image, decode_images, encode_image
from storage.tables import read_images, stream_images, write_rows


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_every_pixel_comes_back(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encode_image(pixels)
    assert data == encode_image(pixels)
    found = decode_image(data)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(SchemaMismatch, match=r"must be uint8 of shape \(h, w, 3\), not"):
        encode_image(pixels)


@pytest.mark.parametrize("data", [b"", b"RIFF", encode_image(np.zeros((9, 9, 3), np.uint8))[:-9]])
def test_bytes_that_are_no_image_are_told(data):
    with pytest.raises(CorruptArtifact, match="stored bytes are not an image"):
        decode_image(data)


@pytest.mark.parametrize("count", [1, 7, 64, 150])
def test_many_come_back_in_their_order(count):
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3, 5, 3), dtype=np.uint8)
    stored = [encode_image(image) for image in pixels]
    np.testing.assert_array_equal(decode_images(stored), pixels)
    with pytest.raises(CorruptArtifact, match="stored bytes are not an image"):
        decode_images([*stored[1:], b"RIFF"])


@pytest.fixture
def two_hundred(workspace):
    """Two shards of 100 images, 100 kB each, so that a read of all would be seen."""
    for shard in range(2):
        rows = [
            {"sample_id": f"base/{shard}/{index}", "image": f"{shard}:{index};".encode() * 9_000, "format": FORMAT}
            for index in range(100)
        ]
        with staged_artifact(ArtifactRef(str(workspace.root), "night-1", "samples", f"shard-{shard}")) as folder:
            write_rows(folder, "images", rows)
    return workspace


def test_images_lie_in_row_groups_of_64_uncompressed(two_hundred):
    path = two_hundred.run_folder("night-1") / "samples" / "shard-0" / "images.parquet"
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [64, 36]
    assert {(group.column(1).compression, group.column(1).has_dictionary_page) for group in groups} == {
        ("UNCOMPRESSED", False)
    }


def test_chosen_images_are_found(two_hundred):
    wanted = ["base/1/99", "base/0/0", "base/0/64", "base/7/0", "base/0/0"]
    found = read_images(two_hundred, "night-1", wanted)
    assert {name: data[:7].split(b";")[0] for name, data in found.items()} == {
        "base/1/99": b"1:99",
        "base/0/0": b"0:0",
        "base/0/64": b"0:64",
    }
    assert read_images(two_hundred, "night-1", []) == {}
    assert read_images(two_hundred, "night-2", wanted) == {}
    assert set(read_images(two_hundred, "night-1", wanted, keys=["shard-1"])) == {"base/1/99"}


def test_only_the_row_groups_in_question_are_read(two_hundred):
    """Damage in the first row group does not keep an image in the second from being read."""
    path = two_hundred.run_folder("night-1") / "samples" / "shard-0" / "images.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"0:5;0:5;")] ^= 1
    path.write_bytes(bytes(content))
    assert set(read_images(two_hundred, "night-1", ["base/0/70"])) == {"base/0/70"}
    with pytest.raises(CorruptArtifact):
        read_images(two_hundred, "night-1", ["base/0/5"])


def test_images_come_a_row_group_at_a_time(two_hundred, monkeypatch):
    really, read = pq.ParquetFile.read_row_groups, []

    def watched(file, groups, *arguments):
        read.append(groups)
        return really(file, groups, *arguments)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    wanted = [f"base/{shard}/{index}" for shard in (1, 0) for index in (99, 3, 70)]
    coming = stream_images(two_hundred, "night-1", wanted)
    assert next(coming)[0] == "base/0/3"
    assert read == [[0]]
    found = [name for name, _ in coming]
    assert found == ["base/0/70", "base/0/99", "base/1/3", "base/1/70", "base/1/99"]
    assert read == [[0], [1], [0], [1]]
