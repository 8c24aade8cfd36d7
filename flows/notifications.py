"""What the server does by itself about popalign's runs: it marks dead ones as crashed, and notifies if asked to."""

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events import ResourceSpecification
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from flows.dispatch import GPU_DEPLOYMENT
from popalign_core.errors import InvalidInput
from tasks.events import DRIFTED

# Each worker's PREFECT_FLOWS_HEARTBEAT_FREQUENCY is 30: three signs of life may be lost before a run counts as dead.
SECONDS_WITHOUT_SIGN_OF_LIFE = 90
RUN_EVENT = "prefect.flow-run."
HEARTBEAT = f"{RUN_EVENT}heartbeat"
# An event bears the name of the state, and two of ours have names that Prefect does not know.
FAILED = {"Failed", "Held", "QualityGateFailed"}
# After any of these the process of a run has ended or pauses, and gives no more signs of life.
WITHOUT_PROCESS = {
    *FAILED, "Completed", "Crashed", "Cancelled", "Cached", "Paused", "Suspended", "Scheduled", "AwaitingRetry",
    "AwaitingConcurrencySlot",
}  # fmt: skip
OURS = ResourceSpecification({"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.popalign"})
# Not the stages inside a run, and not the pieces of one on GPU workers: the run that started those tells of them.
STARTED_BY_ITSELF = ResourceSpecification(
    {"prefect.resource.role": "deployment", "prefect.resource.name": f"!{GPU_DEPLOYMENT}"}
)
ANY_RUN = ResourceSpecification({"prefect.resource.id": f"{RUN_EVENT}*"})
RUN_SUBJECT = "popalign: {{ flow_run.name }} {{ event.resource['prefect.state-name'] }}"
RUN_BODY = """{{ flow_run.name }} ({{ flow.name }}/{{ deployment.name }}) {{ event.resource['prefect.state-name'] }}
{{ event.resource['prefect.state-message'] or 'without a message' }}
{{ flow_run|ui_url }}"""
DRIFT_SUBJECT = "popalign: {{ event.payload.axis }} disparity drifted"
DRIFT_BODY = """{{ event.payload.axis }} disparity of the base model in {{ event.payload.run_id }}
now: {{ event.payload.now.value }}
was in {{ event.payload.compared_with }}: {{ event.payload.before.value }}
may be chance: {{ event.payload.tolerance }}"""


def zombies() -> AutomationCore:
    """Marks a run as crashed whose process has given no sign of life: a killed machine reports nothing."""
    return AutomationCore(
        name="popalign: zombies",
        description="Marks runs as crashed whose worker or machine is gone, so that they are seen and can be retried.",
        trigger=EventTrigger(
            match=ANY_RUN,
            match_related=OURS,
            after={HEARTBEAT},
            expect={HEARTBEAT, *(RUN_EVENT + state for state in WITHOUT_PROCESS)},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SECONDS_WITHOUT_SIGN_OF_LIFE),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"no sign of life for {SECONDS_WITHOUT_SIGN_OF_LIFE} s: the process, its worker or its machine "
                "is gone. Retry this run: it goes on after the last committed shard.",
                force=False,
            )
        ],
    )


def notifications(block: UUID) -> list[AutomationCore]:
    """Notices of runs that failed, crashed or are late, and of a drift of the nightly base model."""
    told = SendNotification(block_document_id=block, subject=RUN_SUBJECT, body=RUN_BODY)
    drifted = SendNotification(block_document_id=block, subject=DRIFT_SUBJECT, body=DRIFT_BODY)
    runs = [OURS, STARTED_BY_ITSELF]
    return [
        _notice("popalign: run failed", {RUN_EVENT + state for state in FAILED}, ANY_RUN, runs, told),
        _notice("popalign: run crashed", {f"{RUN_EVENT}Crashed"}, ANY_RUN, runs, told),
        _notice("popalign: run late", {f"{RUN_EVENT}Late"}, ANY_RUN, runs, told),
        _notice("popalign: disparity drifted", {DRIFTED}, ResourceSpecification({}), [], drifted),
    ]


def _notice(
    name: str,
    events: set[str],
    match: ResourceSpecification,
    related: list[ResourceSpecification],
    action: ActionTypes,
) -> AutomationCore:
    trigger = EventTrigger(
        match=match,
        match_related=[*related] if related else ResourceSpecification({}),
        expect=events,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    return AutomationCore(name=name, description="Set up by popalign.", trigger=trigger, actions=[action])


def notification_block(client: SyncPrefectClient, name: str, ui: str) -> UUID:
    """The notification block named type/name. ui: address of the pages. Raises: InvalidInput if it is not there."""
    kind, slash, document = name.partition("/")
    if not slash or not kind or not document:
        raise InvalidInput(f"--notify {name!r} names no block: write type/name, as in slack-webhook/ops.")
    try:
        found = client.read_block_document_by_name(document, kind, include_secrets=False)
    except ObjectNotFound as error:
        raise InvalidInput(
            f"there is no block {name} on this server. Create it at {ui}/blocks/catalog/{kind}/create with the name "
            f"{document}, or with `prefect block create {kind}`, then do this again."
        ) from error
    if found.block_schema is None or "notify" not in found.block_schema.capabilities:
        raise InvalidInput(f"the block {name} cannot notify: choose a slack-webhook or a custom-webhook, say.")
    return found.id


def ensure(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """Creates an automation, or updates those of its name where they differ; one that was disabled stays so.

    Returns: "created", "updated" or "kept".
    """
    present = client.read_automations_by_name(wanted.name)
    if not present:
        client.create_automation(wanted)
        return "created"
    outcome = "kept"
    for automation in present:
        definition = AutomationCore.model_validate(automation.model_dump(include=set(AutomationCore.model_fields)))
        as_left = wanted.model_copy(update={"enabled": definition.enabled})
        if definition != as_left:
            client.update_automation(automation.id, as_left)
            outcome = "updated"
    return outcome
