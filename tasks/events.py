"""What others can react to in Prefect: a shard that was committed, a decision, a drift."""

from typing import Any

from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event

from storage.artifacts import ArtifactRef

COMMITTED = "popalign.shard.committed"
DECIDED = "popalign.decision.made"
DRIFTED = "popalign.disparity.drifted"


def emit(event: str, run_id: str, what: str, payload: dict[str, Any]) -> None:
    """Emits an event about a part of a run; outside a run of Prefect nobody listens, and nothing is sent."""
    if FlowRunContext.get() is None and TaskRunContext.get() is None:
        return
    resource = {
        "prefect.resource.id": f"popalign.run.{run_id}.{what}",
        "prefect.resource.name": f"{run_id} {what}",
        "popalign.run-id": run_id,
    }
    emit_event(event, resource=resource, payload=payload)


def announce_commit(ref: ArtifactRef, items: int) -> None:
    """One event a committed shard. items: images, rows or steps in it."""
    facts = {"run_id": ref.run_id, "table": ref.table, "key": ref.key, "items": items}
    emit(COMMITTED, ref.run_id, f"{ref.table}.{ref.key}", facts)
