"""Artifacts on the page of the flow run that this is called in.

Prefect's own functions (3.8.8) make a client with every call and leave its connection open.
"""

from typing import Any, cast
from uuid import UUID

from prefect.artifacts import Artifact, ProgressArtifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import FlowRunContext


def show(artifact: Artifact) -> UUID | None:
    """Puts an artifact on the page and returns its id; outside a flow run there is no page.

    Raises: httpx.HTTPError if the server does not answer.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    with get_client(sync_client=True) as client:
        return client.create_artifact(
            ArtifactCreate(
                key=artifact.key,
                type=artifact.type,
                description=artifact.description,
                data=_data(artifact),
                flow_run_id=context.flow_run.id,
            )
        ).id


def show_progress(artifact_id: UUID, percent: float, description: str) -> None:
    """Changes a progress artifact. Raises: httpx.HTTPError if the server does not answer."""
    data = _data(ProgressArtifact(progress=percent))
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact_id, ArtifactUpdate(description=description, data=data))


def _data(artifact: Artifact) -> dict[str, Any]:
    return cast("dict[str, Any]", artifact.format())  # a coroutine only where an event loop runs
