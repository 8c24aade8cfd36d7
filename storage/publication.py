"""Files made from committed tables, for people: replaced whole, never half-written, made again at any time."""

import os
from pathlib import Path

from storage.layout import Workspace, check_name


def publish_file(workspace: Workspace, run_id: str, name: str, content: bytes) -> Path:
    """Writes a file into the run's folder in one step; returns its path."""
    path = workspace.run_folder(run_id) / check_name("file name", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_bytes(content)
    os.replace(draft, path)
    return path
