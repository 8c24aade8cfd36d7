"""Errors of a training's processes on their way to whoever started it: as text, never as a pickle."""

import builtins
import json
import os
import signal
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popalign_core.errors import LostProcess, PopalignError
from storage.disk import write_in_one_step
from storage.errors import StorageError

if TYPE_CHECKING:
    from popalign_core.alignment.processes import Processes

# Within what `Processes.gather_texts` carries; the end of a traceback says most.
TEXT_CHARACTERS = 8000
LOST = "lost.json"
LOG_LINES = 30


def to_text(error: BaseException) -> str:
    """An error as JSON, with its traceback as far as it fits between processes."""
    values: dict[str, Any] = {"class": type(error).__name__, "message": str(error), "errno": None}
    if isinstance(error, OSError) and error.errno is not None:
        names = f": {error.filename}" if error.filename else ""
        values |= {"errno": error.errno, "message": f"{error.strerror}{names}"}
    values["message"] = values["message"][: TEXT_CHARACTERS // 2]
    trace = "".join(traceback.format_exception(error))[-TEXT_CHARACTERS // 4 :]
    return json.dumps(values | {"trace": trace})


def from_text(text: str) -> Exception:
    """The error again: the same class and message where the class is ours or Python's, else a RuntimeError.

    The traceback of where it was raised is its note.
    """
    values: dict[str, Any] = json.loads(text)
    kind, message = _known_classes().get(values["class"]), values["message"]
    try:
        if kind is None:
            raise TypeError
        error = kind(message) if values["errno"] is None else kind(values["errno"], message)
    except TypeError:  # of a library, or built from more than a message
        error = RuntimeError(f"{values['class']}: {message}")
    error.add_note("Raised in a training process:\n" + values["trace"])
    return error


@contextmanager
def same_outcome(processes: "Processes") -> Generator[None]:
    """What fails inside in one process fails in all of them, with the same error; waits for all.

    For what a step's own exchange does not cover: loading, and what one process alone writes.
    """
    failure = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below, once the others know
        failure = error
    try:
        others = processes.gather_texts("" if failure is None else to_text(failure))
    except LostProcess:
        if failure is None:
            raise
        others = []
    if failure is not None:
        raise failure
    for text in others:
        if text:
            raise from_text(text)


def write_failure(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves an error of one process for `read_failure`."""
    write_in_one_step(folder / f"error.{rank}.json", to_text(error).encode())


def read_failure(folder: Path, code: int, log: str) -> Exception:
    """Why processes of this host ended. code: the launcher's exit code. log: what they printed.

    What a process raised counts before what the others saw of its end.
    """
    errors = [from_text(path.read_text()) for path in sorted(folder.glob("error.*.json"))]
    found = next((error for error in errors if not isinstance(error, LostProcess)), None)
    if found is not None:
        return found
    lost: dict[str, Any] = json.loads((folder / LOST).read_text()) if (folder / LOST).exists() else {}
    signalled = [(rank, status) for rank, status in lost.get("exits", []) if status < 0]
    # The agent ends the others by SIGTERM.
    killed = [each for each in signalled if each[1] != -signal.SIGTERM] or ([] if errors else signalled)
    if killed:
        ended = "; ".join(f"training process {rank} was ended by {_signal(status)}" for rank, status in killed)
        error = LostProcess(f"{ended}, and the others with it. The same call goes on from the last checkpoint.")
    elif "rendezvous" in lost:
        error = LostProcess(lost["rendezvous"])
    elif errors:
        error = errors[0]
    elif code < 0:
        error = LostProcess(f"the launcher of the training processes was ended by {_signal(code)}, and they with it.")
    else:
        error = RuntimeError(f"the training processes ended with exit code {code} and did not say why.")
    error.add_note("Last lines they printed:\n" + "\n".join(log.splitlines()[-LOG_LINES:]))
    return error


def _signal(status: int) -> str:
    return signal.Signals(-status).name


def _known_classes() -> dict[str, type[Exception]]:
    """By name: every error of the computation and of the disk, and Python's own."""
    known = {name: kind for name, kind in vars(builtins).items() if _is_error(kind)}
    waiting: list[type[Exception]] = [PopalignError, StorageError]
    while waiting:
        kind = waiting.pop()
        known[kind.__name__] = kind
        waiting += kind.__subclasses__()
    return known


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def exit_at_once() -> None:
    """Ends this process without waiting for what it is in the middle of, as a kill would."""
    os._exit(1)
