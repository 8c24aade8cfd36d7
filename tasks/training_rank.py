"""`python -m tasks.training_rank <folder>`: a process of a training, started by `tasks.training_launcher`."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from popalign_core.errors import InvalidInput
from tasks.training_errors import exit_at_once, write_failure
from tasks.training_launcher import STORE_VARIABLE
from tasks.training_processes import ORDER, Report, StepFile, end_with_parent

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

# Longer than the first process takes to write a checkpoint, for which the others wait.
EXCHANGE_TIMEOUT = timedelta(minutes=20)


def main(folder: Path) -> int:
    """Returns the exit code; an error is left in the folder for whoever started the training."""
    end_with_parent(exit_at_once)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    try:
        _train(folder, local_rank)
    except Exception as error:  # noqa: BLE001 - raised again where the training was asked for
        write_failure(folder, rank, error)
        # Not an orderly end: an exchange that cannot end would be waited for.
        exit_at_once()
    return 0


def _train(folder: Path, local_rank: int) -> None:
    from torch import distributed

    from tasks.alignment import RoundOrder, train_round

    order = RoundOrder.from_json((folder / ORDER).read_text())
    device = local_device(order.config.device, local_rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    accelerator = joined(device)
    report = StepFile(folder).report() if local_rank == 0 else Report(lambda _: None, lambda _: None)
    train_round(order, report, accelerator, device)
    distributed.destroy_process_group()


def joined(device: str) -> "Accelerator":
    """Joins the processes that the launcher started, in the store that it opened."""
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
    from torch import cuda, distributed
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, _, port = os.environ[STORE_VARIABLE].rpartition(":")
    store = TCPStore(host, int(port), is_master=False, timeout=EXCHANGE_TIMEOUT, wait_for_workers=False)
    if device != "cpu":
        cuda.set_device(device)
    distributed.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=PrefixStore("popalign", store),
        rank=rank,
        world_size=world,
        timeout=EXCHANGE_TIMEOUT,
    )
    return Accelerator(cpu=device == "cpu", mixed_precision="no")


def local_device(name: str, local_rank: int, processes: int) -> str:
    """The device of one of a host's processes: each has a GPU of its own. name: as in the configuration.

    Raises: InvalidInput.
    """
    import torch

    from popalign_core.models.sdxl import pick_device

    device = pick_device(name)
    if device.type == "cpu":
        return "cpu"
    if str(device) != "cuda":
        raise InvalidInput(
            f"device is {name!r}, and a training of several processes needs cuda or cpu. Which GPUs are used is said "
            "by CUDA_VISIBLE_DEVICES."
        )
    if processes > torch.cuda.device_count():
        raise InvalidInput(
            f"{processes} training processes on this host, which has {torch.cuda.device_count()} GPUs: one each is "
            "needed. Use fewer processes, or let the process that starts them see more GPUs (`popalign up "
            "--gpus-per-worker`, CUDA_VISIBLE_DEVICES of a worker)."
        )
    return f"cuda:{local_rank}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
