"""Where things lie: `runs/<run>/<table>/<key>/` with a manifest last, and one catalog file a workspace."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from storage.disk import disk_errors, make_folder, write_in_one_step
from storage.errors import InvalidName, WorkspaceNotUsable, WorkspaceTooNew

SCHEMA_VERSION = 1
MARKER = "workspace.json"
STAGING = ".staging"
WORKSPACE_VARIABLE = "POPALIGN_WORKSPACE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(kind: str, name: str) -> str:
    """Returns the name. Raises: InvalidName unless it is a safe file name."""
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{kind} {name!r} is not usable: letters, digits, '.', '_' and '-' only, beginning with a letter or digit, "
            "100 at most."
        )
    return name


@dataclass(frozen=True)
class Workspace:
    """A folder that holds runs. root: absolute."""

    root: Path

    @classmethod
    def open(cls, root: str | Path) -> "Workspace":
        """Opens a workspace, making it where there is none.

        root: empty = what POPALIGN_WORKSPACE names, else ./workspace; hosts may have one disk in different places.
        Raises: WorkspaceTooNew, WorkspaceNotUsable, StorageFull.
        """
        chosen = root if str(root) else os.environ.get(WORKSPACE_VARIABLE) or "workspace"
        workspace = cls(Path(chosen).absolute())
        try:
            version = _marked_version(workspace.root / MARKER)
            if version is None:
                _mark(workspace.root)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise WorkspaceNotUsable(
                f"{workspace.root} cannot be a workspace ({error.strerror}): a folder that you may write to is needed. "
                "Choose another --workspace."
            ) from error
        if version is not None and version > SCHEMA_VERSION:
            raise WorkspaceTooNew(
                f"{workspace.root} was written with schema {version}; this program knows up to {SCHEMA_VERSION}. "
                "Update popalign, or choose another --workspace. Nothing was changed."
            )
        return workspace

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return self.root / "runs"

    @property
    def cache(self) -> Path:
        """What can be removed at any time and is then computed again."""
        return self.root / "cache"

    @property
    def catalog(self) -> Path:
        """The DuckDB file."""
        return self.root / "catalog.duckdb"

    def run_folder(self, run_id: str) -> Path:
        """Folder of one run. Raises: InvalidName."""
        return self.runs / check_name("run id", run_id)

    def run_ids(self) -> list[str]:
        """Runs with at least a folder, by name."""
        return sorted(path.name for path in self.runs.glob("*") if path.is_dir() and not path.name.startswith("."))


def _marked_version(marker: Path) -> int | None:
    try:
        values = cast("dict[str, Any]", json.loads(marker.read_text()))
        return int(values["schema_version"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise WorkspaceNotUsable(
            f"{marker} is damaged: it should hold {{'schema_version': {SCHEMA_VERSION}}}. Remove it if this program "
            "wrote the workspace, or choose another --workspace. Nothing was changed."
        ) from error


def _mark(root: Path) -> None:
    with disk_errors(root):
        make_folder(root)
        write_in_one_step(root / MARKER, (json.dumps({"schema_version": SCHEMA_VERSION}) + "\n").encode())
