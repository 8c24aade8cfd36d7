"""Who holds a run while its stages work: the flow that was started, and not the stages below it."""

from collections.abc import Generator
from contextlib import contextmanager

from prefect.runtime import deployment, flow_run

from storage.layout import Workspace
from storage.locks import run_lock
from tasks.versions import require_same_version


@contextmanager
def holding(workspace: str, run_id: str) -> Generator[None]:
    """Holds the run if nothing above does.

    Raises: RunInUse at once if another process holds it; OtherVersion on a worker with other code than its parent's.
    """
    if flow_run.parent_flow_run_id is None:
        with run_lock(Workspace.open(workspace), run_id):
            yield
        return
    if deployment.id is not None:
        require_same_version(workspace, run_id)
    yield
