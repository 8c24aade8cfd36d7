"""Embeddings of prompts, kept for every worker and run that has the same text encoders.

    cache/embeddings/<encoder digest>/<hash of the text>.npz

A file that is damaged, as after a power cut, counts as absent.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from storage.disk import disk_errors
from storage.layout import Workspace, check_name

Embedding = tuple[np.ndarray, np.ndarray]


def read_embeddings(workspace: Workspace, encoder: str, texts: Iterable[str]) -> dict[str, Embedding]:
    """(context, pooled) of those texts that were kept. encoder: digest of everything that moves an embedding."""
    found: dict[str, Embedding] = {}
    for text in texts:
        try:
            # Opened here: numpy leaves a file open that is no archive.
            with (
                _path(workspace, encoder, text).open("rb") as file,
                np.load(file, allow_pickle=False) as stored,
            ):
                found[text] = stored["context"], stored["pooled"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    return found


def write_embeddings(workspace: Workspace, encoder: str, embeddings: Mapping[str, Embedding]) -> None:
    """Keeps embeddings; two writers of one text write the same. Raises: StorageFull."""
    folder = _folder(workspace, encoder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for text, (context, pooled) in embeddings.items():
            descriptor, draft = tempfile.mkstemp(prefix=".draft~", dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    np.savez(stream, context=context, pooled=pooled)
                # Not flushed: what a power cut takes is encoded again.
                os.replace(draft, _path(workspace, encoder, text))
            finally:
                Path(draft).unlink(missing_ok=True)


def _folder(workspace: Workspace, encoder: str) -> Path:
    return workspace.cache / "embeddings" / check_name("encoder", encoder)


def _path(workspace: Workspace, encoder: str, text: str) -> Path:
    return _folder(workspace, encoder) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"
