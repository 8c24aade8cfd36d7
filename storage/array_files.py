"""Arrays that are kept to save work: a file is whole or counts as absent, as after a power cut."""

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def read_arrays(path: Path, names: tuple[str, ...]) -> tuple[np.ndarray, ...] | None:
    """The arrays of these names; None where the file is absent or damaged."""
    try:
        # Opened here: numpy leaves a file open that is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return tuple(stored[name] for name in names)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes or replaces a file in an existing folder; two writers of the same content do no harm."""
    descriptor, draft = tempfile.mkstemp(prefix=".draft~", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        # Not flushed: what a power cut takes is computed again.
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
