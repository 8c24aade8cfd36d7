"""Errors that name the fact, the expectation and the way out. All survive pickling between processes."""

from typing import Any


class PopalignError(Exception):
    """Base of the errors that a user can act on: shown as one message, without a traceback.

    Subclasses take keyword arguments only and build their message from them.
    """

    def __init__(self, message: str = "", **facts: Any):
        super().__init__(message or self.describe(**facts))
        self.facts = facts
        self._message = message

    def describe(self, **facts: Any) -> str:
        """The message made from the facts."""
        return ", ".join(f"{name}: {value}" for name, value in facts.items())

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self._message, self.facts))


def _rebuild(kind: type[PopalignError], message: str, facts: dict[str, Any]) -> PopalignError:
    return kind(message, **facts)


class InvalidInput(PopalignError):
    """Something that a user wrote is not usable; nothing was started."""


class UnknownName(InvalidInput):
    """A preset, axis, group, suite or objective of that name does not exist."""

    def describe(self, *, kind: str, got: str, known: list[str]) -> str:
        return f"unknown {kind} {got!r}. Known: {', '.join(known)}."


class ModelNotUsable(InvalidInput):
    """A checkpoint folder lacks a part, has another architecture, or holds pickles."""


class TrainingDiverged(PopalignError):
    """The loss or a gradient is not a number; nothing was committed."""

    def describe(self, *, step: int, loss: float) -> str:
        return (
            f"the loss became {loss} at step {step}; training stopped and committed nothing. "
            "Lower alignment.learning_rate or alignment.beta."
        )
