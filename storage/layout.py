"""Where things lie: `runs/<run>/<table>/<key>/` with a manifest last, and one catalog file a workspace."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from storage.errors import InvalidName, WorkspaceTooNew

SCHEMA_VERSION = 1
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
        """Opens a workspace, making it where there is none. Raises: WorkspaceTooNew."""
        workspace = cls(Path(root).absolute())
        marker = workspace.root / "workspace.json"
        if marker.is_file():
            version = int(json.loads(marker.read_text())["schema_version"])
            if version > SCHEMA_VERSION:
                raise WorkspaceTooNew(
                    f"{workspace.root} was written with schema {version}; this program knows up to {SCHEMA_VERSION}. "
                    "Update popalign, or choose another --workspace. Nothing was changed."
                )
            return workspace
        workspace.root.mkdir(parents=True, exist_ok=True)
        # Replaced in one step: two processes may open a new workspace at once.
        draft = workspace.root / f".workspace-{os.getpid()}.json"
        draft.write_text(json.dumps({"schema_version": SCHEMA_VERSION}) + "\n")
        os.replace(draft, marker)
        return workspace

    @property
    def runs(self) -> Path:
        """Folder of all runs."""
        return self.root / "runs"

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
