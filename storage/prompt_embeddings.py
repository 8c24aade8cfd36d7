"""Embeddings of prompts, kept for every worker and run that has the same text encoders.

    cache/embeddings/<encoder digest>/<hash of the text>.npz

A file that is damaged, as after a power cut, counts as absent.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from storage.array_files import read_arrays, write_arrays
from storage.disk import disk_errors
from storage.layout import Workspace, check_name

Embedding = tuple[np.ndarray, np.ndarray]


def read_embeddings(workspace: Workspace, encoder: str, texts: Iterable[str]) -> dict[str, Embedding]:
    """(context, pooled) of those texts that were kept. encoder: digest of everything that moves an embedding."""
    found: dict[str, Embedding] = {}
    for text in texts:
        stored = read_arrays(_path(workspace, encoder, text), ("context", "pooled"))
        if stored is not None:
            found[text] = stored[0], stored[1]
    return found


def write_embeddings(workspace: Workspace, encoder: str, embeddings: Mapping[str, Embedding]) -> None:
    """Keeps embeddings; two writers of one text write the same. Raises: StorageFull."""
    folder = _folder(workspace, encoder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for text, (context, pooled) in embeddings.items():
            write_arrays(_path(workspace, encoder, text), {"context": context, "pooled": pooled})


def _folder(workspace: Workspace, encoder: str) -> Path:
    return workspace.cache / "embeddings" / check_name("encoder", encoder)


def _path(workspace: Workspace, encoder: str, text: str) -> Path:
    return _folder(workspace, encoder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
