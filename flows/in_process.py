"""What a command needs that runs flows in its own process: a quiet Prefect, and no heartbeat."""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from popalign_core.execution import Execution

T = TypeVar("T")


def split_execution(settings: list[str]) -> "tuple[list[str], Execution]":
    """Settings of the run, and where it is to be done: those that begin with execution."""
    from popalign_core.execution import parse_execution

    where = [setting.removeprefix("execution.") for setting in settings if setting.startswith("execution.")]
    return [setting for setting in settings if not setting.startswith("execution.")], parse_execution(where)


def quiet_prefect() -> None:
    """Before anything is imported that reads these: tqdm does, and torch imports it.

    The terminal shows progress bars; Prefect's log stays in its user interface.
    """
    # CRITICAL: an error is shown once, by main(), and not as a traceback of every flow above it.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    # A busy machine takes longer than the 20 s that Prefect waits for its own server.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("httpx").setLevel(logging.WARNING)


def without_heartbeat(call: Callable[[], T]) -> T:
    """In one process nobody watches a heartbeat, and joining its thread costs a second a flow."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        return call()
