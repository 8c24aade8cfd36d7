"""Vectors of images as one classifier saw them: with these a further axis needs no images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.artifacts import ArtifactRef, is_committed
from storage.errors import NotCommitted
from storage.layout import Workspace
from storage.schemas import schema
from storage.tables import read_table, write_rows

TABLE = "embeddings"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """vectors: float32 (rows, dims). regions: 0 = the whole image, else the position of a box. By row."""

    embedder_id: str
    sample_ids: list[str]
    regions: list[int]
    vectors: np.ndarray

    @property
    def of_whole_images(self) -> np.ndarray:
        """Vectors of whole images alone, in their order."""
        return self.vectors[np.asarray(self.regions, dtype=int) == 0]


def write_embeddings(folder: Path, run_id: str, model_id: str, found: Embeddings, table: str = TABLE) -> None:
    """Writes `<table>.parquet` into a staged folder. table: embeddings or image_features."""
    rows, width = found.vectors.shape
    flat = pa.array(np.ascontiguousarray(found.vectors, dtype=np.float32).ravel(), type=pa.float32())
    offsets = pa.array(np.arange(0, (rows + 1) * width, width or 1, dtype=np.int32)[: rows + 1])
    columns = {
        "run_id": [run_id] * rows,
        "model_id": [model_id] * rows,
        "sample_id": found.sample_ids,
        "region": found.regions,
        "embedder_id": [found.embedder_id] * rows,
    }
    expected = schema(table)
    arrays = [pa.array(columns[name], type=expected.field(name).type) for name in columns]
    vectors = pa.ListArray.from_arrays(offsets, flat)
    write_rows(folder, table, pa.Table.from_arrays([*arrays, vectors], names=[*columns, "vector"]))


def read_embeddings(ref: ArtifactRef) -> Embeddings:
    """Of one committed artifact. Raises: NotCommitted, CorruptArtifact."""
    if not is_committed(ref):
        raise NotCommitted(f"{ref.table}/{ref.key} of run {ref.run_id} in {ref.workspace} are not committed.")
    table = read_table(Workspace(Path(ref.workspace)), ref.run_id, ref.table, keys=[ref.key])
    vectors = table["vector"].combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    embedders: Sequence[str] = table["embedder_id"].to_pylist()
    return Embeddings(
        embedders[0] if embedders else "",
        table["sample_id"].to_pylist(),
        table["region"].to_pylist(),
        flat.reshape(len(table), -1) if len(table) else np.zeros((0, 0), np.float32),
    )
