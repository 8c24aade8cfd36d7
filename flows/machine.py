"""What this machine has, and what is to run on it: ports, GPUs, the plan of `popalign up`."""

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flows.services import HOST
from popalign_core.errors import InvalidInput


@dataclass(frozen=True)
class Plan:
    """What is to run. devices: values of CUDA_VISIBLE_DEVICES, each of a worker. project: folder of prefect.yaml."""

    project: Path
    workspace: Path
    port: int
    devices: tuple[str, ...]
    cpu_limit: int
    notify: str = ""

    @property
    def placement(self) -> str:
        """Runs compute in the CPU worker where there is no GPU, and send their stages to the others where there is."""
        return "workers" if self.devices else "process"

    @property
    def api_url(self) -> str:
        """Address of the server."""
        return f"http://{HOST}:{self.port}/api"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the numbers of the GPUs that the driver lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listing.splitlines() if line.startswith("GPU "))]


def worker_devices(found: list[str], wanted: int | None, each: int = 1) -> tuple[str, ...]:
    """What each GPU worker sees, as CUDA_VISIBLE_DEVICES has it. each: GPUs of a worker, all for one training.

    wanted: workers, else as many as there are GPUs for; where none was found, their numbers are taken on trust.
    Raises: InvalidInput if there are too few.
    """
    if wanted is None:
        if 0 < len(found) < each:
            raise _too_few(found, f"--gpus-per-worker {each}")
        wanted = len(found) // each
    if found and wanted * each > len(found):
        raise _too_few(found, f"--gpu-workers {wanted}" + (f" --gpus-per-worker {each}" if each > 1 else ""))
    there = found or [str(number) for number in range(wanted * each)]
    return tuple(",".join(there[start : start + each]) for start in range(0, wanted * each, each))


def _too_few(found: list[str], asked: str) -> InvalidInput:
    return InvalidInput(
        f"{asked}: there are {len(found)} GPUs here ({', '.join(found)}), and no two workers share one."
    )


def require_free(port: int) -> None:
    """Raises: InvalidInput if something listens on the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InvalidInput(
                f"port {port} of {HOST} cannot be used ({error.strerror}): stop what has it, or choose another --port."
            ) from error
