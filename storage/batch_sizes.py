"""Batch sizes that fit an accelerator's memory, kept for the next shard.

cache/batch_sizes/<hash of the circumstances>.json
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from storage.disk import disk_errors, make_folder, write_in_one_step
from storage.layout import Workspace


def read_batch_size(workspace: Workspace, circumstances: Mapping[str, str], wanted: int) -> int:
    """The wanted batch size, or the smaller one that was found to fit where one as large as the wanted did not.

    circumstances: all that decides how much fits.
    """
    try:
        found = cast("dict[str, Any]", json.loads(_path(workspace, circumstances).read_text()))
        fits, too_large = int(found["fits"]), int(found["too_large"])
    except (OSError, ValueError, KeyError, TypeError):
        return wanted
    return min(wanted, fits) if wanted >= too_large else wanted


def keep_batch_size(workspace: Workspace, circumstances: Mapping[str, str], fits: int, too_large: int) -> None:
    """Keeps what was found. Raises: StorageFull."""
    path = _path(workspace, circumstances)
    with disk_errors(path.parent):
        make_folder(path.parent)
        found = {"fits": fits, "too_large": too_large, "circumstances": dict(circumstances)}
        write_in_one_step(path, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())


def _path(workspace: Workspace, circumstances: Mapping[str, str]) -> Path:
    named = hashlib.sha256(json.dumps(dict(circumstances), sort_keys=True).encode()).hexdigest()[:16]
    return workspace.cache / "batch_sizes" / f"{named}.json"
