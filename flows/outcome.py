"""What a run came to as a state of Prefect: a model that is not promoted is seen in the list of runs."""

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from tasks.summary import RunSummary

HELD, QUALITY_GATE_FAILED = "Held", "QualityGateFailed"
# Checks of a decision that are not about the disparity itself.
QUALITY_CHECKS = ("_obedience_drop", "_score_drop", "_unknown_rise", "_quality_drop", "_fact_drop", "people_rise")


class NotPromoted(Exception):
    """What a flow raises whose model was measured and is not promoted: a result, and not an error of the run."""

    def __init__(self, message: str, summary: RunSummary):
        super().__init__(message, summary)
        self.summary = summary

    def __str__(self) -> str:
        return str(self.args[0])


def outcome(summary: RunSummary) -> State[Any]:
    """Completed where the model is promoted, else failed under a name that says why."""
    message = f"{summary.verdict}: {summary.reason}"
    if summary.verdict == "promote":
        return Completed(message=message, data=summary)
    quality = any(check.endswith(QUALITY_CHECKS) for check in summary.failed_checks)
    return Failed(name=QUALITY_GATE_FAILED if quality else HELD, message=message, data=NotPromoted(message, summary))


def summary_of(state: State[Any]) -> RunSummary:
    """The summary in a state of `outcome`. Raises: what ended the flow where there is none."""
    try:
        return state.result()
    except NotPromoted as held:
        return held.summary
