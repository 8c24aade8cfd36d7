"""What an exchange between processes raises where another one is gone."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from popalign_core.errors import LostProcess

# gloo raises plain RuntimeErrors: the file of its source that they name is what tells them from others.
_GLOO = "/gloo/"


def exchanged(exchange: Callable[[], Tensor]) -> Tensor:
    """Runs an exchange and nothing else. Raises: LostProcess where it cannot end."""
    try:
        return exchange()
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def exchanging() -> Generator[None]:
    """For a computation with exchanges in it, as the passes of a sharded model. Raises: LostProcess for those alone."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or _GLOO in str(error)):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> LostProcess:
    return LostProcess(
        f"another training process does not answer ({_first_sentence(error)}). It or its host has ended; the "
        "same call goes on from the last checkpoint."
    )


def _first_sentence(error: RuntimeError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
