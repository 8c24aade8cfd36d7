"""What a workspace keeps to save work: embeddings of prompts, batch sizes that fit; and rows written as they come."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.batch_sizes import keep_batch_size, read_batch_size
from storage.errors import SchemaMismatch
from storage.layout import Workspace
from storage.prompt_embeddings import read_embeddings, write_embeddings
from storage.tables import RowWriter, write_rows

ENCODER = "0123456789abcdef"
EMBEDDINGS = {
    "a photo of a judge": (np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([7, 8])),
    "": (np.zeros((2, 3), np.uint16), np.uint16([1, 65535])),
}
CIRCUMSTANCES = {"model": "m", "height": "64", "device": "a card", "dtype": "bfloat16"}


def test_embeddings_come_back_bit_for_bit_and_to_their_encoder_alone(workspace: Workspace) -> None:
    write_embeddings(workspace, ENCODER, EMBEDDINGS)
    found = read_embeddings(workspace, ENCODER, [*EMBEDDINGS, "never seen"])
    assert found.keys() == EMBEDDINGS.keys()
    for text, arrays in EMBEDDINGS.items():
        for stored, expected in zip(found[text], arrays, strict=True):
            assert stored.dtype == expected.dtype
            np.testing.assert_array_equal(stored, expected)
    assert read_embeddings(workspace, "another", EMBEDDINGS) == {}


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_embedding_counts_as_absent(workspace: Workspace, damage: bytes | None) -> None:
    write_embeddings(workspace, ENCODER, EMBEDDINGS)
    path = sorted((workspace.cache / "embeddings" / ENCODER).glob("*.npz"))[0]
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    assert len(read_embeddings(workspace, ENCODER, EMBEDDINGS)) == 1
    write_embeddings(workspace, ENCODER, EMBEDDINGS)
    assert len(read_embeddings(workspace, ENCODER, EMBEDDINGS)) == 2


def test_a_batch_that_was_too_large_is_not_tried_again(workspace: Workspace) -> None:
    assert read_batch_size(workspace, CIRCUMSTANCES, 16) == 16
    keep_batch_size(workspace, CIRCUMSTANCES, fits=4, too_large=8)
    assert [read_batch_size(workspace, CIRCUMSTANCES, wanted) for wanted in (16, 8, 7, 4, 2)] == [4, 4, 7, 4, 2]
    assert read_batch_size(workspace, CIRCUMSTANCES | {"device": "another"}, 16) == 16
    (path,) = (workspace.cache / "batch_sizes").iterdir()
    path.write_text("{")
    assert read_batch_size(workspace, CIRCUMSTANCES, 16) == 16


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=4))
def test_rows_that_come_in_parts_make_the_same_file(tmp_path_factory: pytest.TempPathFactory, parts: list[int]) -> None:
    rng = np.random.default_rng(0)
    rows = [{"sample_id": f"s{n}", "image": rng.bytes(300), "format": "webp"} for n in range(sum(parts))]
    folders: list[Path] = [tmp_path_factory.mktemp(name) for name in ("whole", "parts")]
    write_rows(folders[0], "images", rows)
    writer, start = RowWriter(folders[1], "images"), 0
    for count in parts:
        writer.add(rows[start : start + count])
        start += count
    writer.close()
    assert (folders[1] / "images.parquet").read_bytes() == (folders[0] / "images.parquet").read_bytes()


def test_a_row_that_does_not_fit_is_refused_as_it_comes(tmp_path: Path) -> None:
    writer = RowWriter(tmp_path, "images")
    with pytest.raises(SchemaMismatch, match="column image: expected binary"):
        writer.add([{"sample_id": "s", "image": 3, "format": "webp"}] * 64)
