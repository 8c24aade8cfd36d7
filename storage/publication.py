"""Files made from committed tables, for people: replaced whole, never half-written, made again at any time."""

from pathlib import Path

from storage.disk import disk_errors, make_folder, write_in_one_step
from storage.layout import Workspace, check_name


def publish_file(workspace: Workspace, run_id: str, name: str, content: bytes) -> Path:
    """Writes a file into the run's folder in one step; returns its path. Raises: InvalidName, StorageFull."""
    path = workspace.run_folder(run_id) / check_name("file name", name)
    with disk_errors(path):
        make_folder(path.parent)
        write_in_one_step(path, content)
    return path


def publish_page(workspace: Workspace, name: str, content: bytes) -> Path:
    """The same beside the catalog: about all runs. Raises: InvalidName, StorageFull."""
    path = workspace.root / check_name("file name", name)
    with disk_errors(path):
        write_in_one_step(path, content)
    return path
