"""Errors that name the fact, the expectation and the way out. All survive pickling between processes."""

from collections.abc import Sequence
from typing import Any


class PopalignError(Exception):
    """Base of the errors that a user can act on: shown as one message, without a traceback."""

    def __init__(self, message: str = "", **facts: Any):
        template = self.template
        super().__init__(message or template.format(**facts))
        self.facts = facts

    # Filled with the facts where no finished message is given.
    template = ""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), str(self), self.facts))


def _rebuild(kind: type[PopalignError], message: str, facts: dict[str, Any]) -> PopalignError:
    return kind(message, **facts)


class InvalidInput(PopalignError):
    """Something that a user wrote is not usable; nothing was started."""


class UnknownName(InvalidInput):
    """A preset, axis, group, suite or objective of that name does not exist."""

    def __init__(self, message: str = "", *, kind: str = "", got: str = "", known: Sequence[str] = ()):
        text = message or f"unknown {kind} {got!r}. Known: {', '.join(known)}."
        super().__init__(text, kind=kind, got=got, known=list(known))


class ModelNotUsable(InvalidInput):
    """A checkpoint folder lacks a part, has another architecture, or holds pickles."""


class TrainingDiverged(PopalignError):
    """The loss or a gradient is not a number; nothing was committed."""

    template = (
        "the loss became {loss} at step {step}; training stopped and committed nothing. "
        "Lower alignment.learning_rate or alignment.beta."
    )


class LossSpike(TrainingDiverged):
    """The loss jumped far above those before it; nothing was committed."""

    template = (
        "the loss jumped to {loss:.4g} at step {step}, {score:.1f} robust standard deviations above the last ones "
        "(alignment.spike_limit is {limit}); training stopped and committed nothing. Lower alignment.learning_rate or "
        "alignment.beta, or raise the limit."
    )


class LostProcess(PopalignError, ConnectionError):
    """A process or host that a training was shared with is gone. An OSError: worth another try."""
