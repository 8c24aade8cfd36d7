"""Which code a process runs, so that workers with another one are refused by name."""

import hashlib
import json
import socket
from functools import cache
from importlib.metadata import version
from pathlib import Path

from popalign_core.errors import InvalidInput
from storage.layout import Workspace
from storage.tables import read_rows

PACKAGES = ("flows", "tasks", "popalign_core", "storage")


class OtherVersion(InvalidInput):
    """This process has another popalign than the one that started the run."""


@cache
def code_version() -> str:
    """Popalign's version with a digest of its sources: an edited checkout is another one."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{version('popalign')}+{digest.hexdigest()[:12]}"


def require_same_version(workspace: str, run_id: str) -> None:
    """Raises: OtherVersion if the run was last started by other code. For work that was sent to another process."""
    starts = read_rows(Workspace.open(workspace), run_id, "starts")
    if not starts:
        return
    theirs, ours = json.loads(starts[-1]["versions_json"]).get("popalign"), code_version()
    if theirs != ours:
        raise OtherVersion(
            f"the worker on {socket.gethostname()} has popalign {ours}, and run {run_id!r} was started by {theirs}. "
            "Install the same on every host, restart its workers, and retry the run."
        )
