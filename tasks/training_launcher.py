"""`python -m tasks.training_launcher <folder>`: torch's elastic agent, started by `tasks.training_processes`.

It starts this host's processes, and ends all as soon as one has failed.
"""

import json
import os
import signal
import socket
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from tasks.training_processes import PLAN, end_with_parent

WAIT_SECONDS = 900
SHUTDOWN_SECONDS = 5
LOOPBACK = "127.0.0.1"
STORE_VARIABLE = "POPALIGN_TRAINING_STORE"


def main(folder: Path) -> int:
    """Returns the exit code; what was lost is in the folder's lost.json."""
    # The agent's own handler ends the processes, by force if need be.
    end_with_parent(partial(os.kill, os.getpid(), signal.SIGTERM))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    plan: dict[str, Any] = json.loads((folder / PLAN).read_text())
    try:
        _launch(plan, folder)
    except ChildFailedError as error:
        exits = [(rank, failure.exitcode) for rank, failure in sorted(error.failures.items())]
        _record(folder, {"exits": exits})
        return 1
    except RendezvousError as error:
        why = error.__cause__ or error
        _record(
            folder,
            {
                "rendezvous": f"{plan['hosts']} hosts did not meet at {plan['rendezvous']} within {WAIT_SECONDS} s "
                f"({type(why).__name__}: {str(why).splitlines()[0] if str(why) else 'no reason given'}). Make the same "
                "call on every host, with an address that all of them reach."
            },
        )
        return 1
    except SignalException:
        return 1
    return 0


def _launch(plan: dict[str, Any], folder: Path) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, _, port = (plan["rendezvous"] or f"{LOOPBACK}:0").rpartition(":")
    is_host, port, _store = _open_store(host, int(port))
    os.environ[STORE_VARIABLE] = f"{host}:{port}"
    config = LaunchConfig(
        min_nodes=plan["hosts"],
        max_nodes=plan["hosts"],
        nproc_per_node=plan["per_host"],
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
        run_id=plan["name"],
        rdzv_backend="c10d",
        rdzv_endpoint=os.environ[STORE_VARIABLE],
        rdzv_configs={
            "is_host": is_host,
            "read_timeout": WAIT_SECONDS,
            "timeout": WAIT_SECONDS,
            "join_timeout": WAIT_SECONDS,
        },
        # Where a process is lost the round goes on from its checkpoint, by a new call that also finds new settings.
        max_restarts=0,
        local_addr=host if is_host or host == LOOPBACK else None,
        shutdown_timeout=SHUTDOWN_SECONDS,
    )
    elastic_launch(config, sys.executable)("-P", "-m", plan["module"], str(folder))


def _open_store(host: str, port: int) -> tuple[bool, int, object]:
    """Whether this process holds the store that all meet in, its port, and the store, to be kept.

    torch would listen on all interfaces; here it is the given address alone. The agent, which opens a store of its own,
    gets this one, since a process has one server a port.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        listener = socket.create_server((host, port))
    except OSError:  # another host's address, or another launcher on this one was first
        return False, port, None
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=WAIT_SECONDS),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
    return True, port, store


def _record(folder: Path, what: dict[str, Any]) -> None:
    from tasks.training_errors import LOST

    (folder / LOST).write_text(json.dumps(what))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
