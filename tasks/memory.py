"""The most memory that a piece of work took."""

from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begins a measurement; of the process on the CPU, of what torch has allocated on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _RESET.write_text("5")  # proc(5): the peak of the resident set begins again


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`; None where the system does not tell it.

    On the CPU it holds everything that the process had in memory before, libraries and other models too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return None
