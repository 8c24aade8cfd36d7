"""A process of a training that loads no model: what `tasks.training_processes` does with it is what is tested."""

import os
import signal
import sys
import time
from pathlib import Path

from storage.errors import StorageFull
from tasks.training_errors import exit_at_once, same_outcome, write_failure
from tasks.training_processes import ORDER, StepFile, end_with_parent


def main(folder: Path) -> None:
    end_with_parent(exit_at_once)
    rank, order = int(os.environ["RANK"]), (folder / ORDER).read_text()
    if order == "wait":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (folder / f"waiting.{rank}").touch()
        time.sleep(600)
    from popalign_core.alignment.processes import Processes
    from tasks.training_rank import joined

    processes = Processes(joined("cpu"))
    try:
        with same_outcome(processes):
            if rank == 0:
                StepFile(folder).report().say("joined")
                StepFile(folder).report().advance(3)
            if rank == 1:
                raise StorageFull(f"the disk of rank {rank} is full")
    except StorageFull as error:
        write_failure(folder, rank, StorageFull(f"rank {rank} heard: {error}"))
        if rank == 1:
            time.sleep(1)  # so that the first one is there to have heard
        exit_at_once()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
