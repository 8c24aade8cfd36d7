"""`popalign up | down | setup`. Also a program by itself, for `up` to call in another process."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from flows.machine import Plan

PORT = 4200
console = Console(soft_wrap=True, highlight=False)
ProjectOption = Annotated[
    Path | None,
    typer.Option(help="Folder of prefect.yaml and flows/; popalign's checkout by default."),
]
NotifyOption = Annotated[
    str, typer.Option(help="Notification block, type/name, that is told of failed, crashed and late runs and of drift.")
]


def up(  # noqa: PLR0913 - options of a command
    workspace: Annotated[Path, typer.Option("--workspace", "-w", help="Folder of the workspace.")] = Path("workspace"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help=f"Of the server; {PORT} by default.")] = None,
    gpu_workers: Annotated[int | None, typer.Option(min=0, help="One a GPU; all GPUs by default.")] = None,
    gpus_per_worker: Annotated[
        int, typer.Option(min=1, help="Of which a training uses execution.training_processes, and all else one.")
    ] = 1,
    cpu_limit: Annotated[
        int | None, typer.Option(min=1, help="Runs at once on the CPU worker; 4 with GPU workers, else 1.")
    ] = None,
    notify: NotifyOption = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return when all is up, and leave it running.")] = False,
    project: ProjectOption = None,
) -> None:
    """Starts Prefect's server, one worker a GPU and one for the CPU on this machine; Ctrl-C stops all of it."""
    from flows.machine import Plan, require_free, visible_gpus, worker_devices
    from flows.services import held

    place = workspace.absolute()
    if held():
        _already_up(place, port)
        return
    devices = worker_devices(visible_gpus(), gpu_workers, gpus_per_worker)
    plan = Plan(_project(project), place, port or PORT, devices, cpu_limit or (4 if devices else 1), notify)
    if detach:
        require_free(plan.port)
        _detach(plan, gpu_workers, gpus_per_worker)
        return
    _open_workspace(place)
    from flows.supervisor import supervise

    console.print(f"starting in {escape(str(place))}")
    supervise(plan, _say)


def down() -> None:
    """Stops what `popalign up` started on this machine."""
    from flows.stopping import take_down

    stopped = take_down()
    console.print(f"stopped {escape(', '.join(stopped))}" if stopped else "nothing was running")


def setup(
    placement: Annotated[
        str, typer.Argument(help="Where stages run: workers (those of the GPU pool) or process (the run's own).")
    ] = "workers",
    api_url: Annotated[str, typer.Option(help="Of the server, ending in /api; PREFECT_API_URL by default.")] = "",
    notify: NotifyOption = "",
    project: ProjectOption = None,
    only_changed: Annotated[
        bool, typer.Option("--only-changed", help="Leave deployments alone whose sources are as they were.")
    ] = False,
) -> None:
    """Makes pools, deployments and automations on a server that runs already; a second time changes nothing."""
    from popalign_core.errors import InvalidInput

    if placement not in ("workers", "process"):
        raise InvalidInput(f"{placement!r} is no placement: workers or process.")
    where: Literal["process", "workers"] = "workers" if placement == "workers" else "process"
    folder = _project(project)
    from flows.provisioning import provision, server_address

    for line in provision(server_address(api_url), folder, where, notify, only_changed):
        _say(line)


def _project(folder: Path | None) -> Path:
    from popalign_core.errors import InvalidInput

    root = folder.absolute() if folder else Path(__file__).resolve().parents[1]
    if not (root / "prefect.yaml").is_file() or not (root / "flows").is_dir():
        raise InvalidInput(
            f"{root} does not hold prefect.yaml and flows/: deployments are made from a checkout. Clone popalign and "
            "install it with `make` or `pip install --editable .`, or name the folder with --project."
        )
    return root


def _open_workspace(place: Path) -> None:
    from storage.layout import Workspace

    Workspace.open(place)


def _already_up(place: Path, port: int | None) -> None:
    """Says what runs. Raises: InvalidInput if something else was asked for."""
    from flows.services import read_record, services_folder, services_status
    from popalign_core.errors import InvalidInput

    record = read_record()
    if record is None:
        console.print("another `popalign up` is starting or stopping")
        return
    if Path(record.workspace) != place or port not in (None, record.port):
        raise InvalidInput(
            f"popalign is up already, with workspace {record.workspace} at port {record.port}: stop it with "
            "`popalign down` first, or do this again with that workspace and port."
        )
    console.print(f"already {'up' if record.ready else 'starting'}: {record.url}")
    for row in services_status():
        console.print(escape(f"  {row.what}: process {row.pid}, {row.state}; {row.detail}"))
    console.print(f"logs: {escape(str(services_folder()))}; stop with: popalign down")


def _detach(plan: "Plan", gpu_workers: int | None, gpus_per_worker: int) -> None:
    """Starts the same in a session of its own, and waits for it. Raises: ServiceDied if it ends."""
    from flows.services import read_record, services_folder
    from flows.supervisor import ServiceDied
    from storage.disk import make_folder

    make_folder(services_folder())
    log = services_folder() / "up.log"
    command = [sys.executable, "-m", "flows.services_cli", "up", "--workspace", str(plan.workspace)]
    command += ["--port", str(plan.port), "--cpu-limit", str(plan.cpu_limit), "--project", str(plan.project)]
    command += [] if gpu_workers is None else ["--gpu-workers", str(gpu_workers)]
    command += ["--gpus-per-worker", str(gpus_per_worker)]
    command += ["--notify", plan.notify] if plan.notify else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while (record := read_record()) is None or not record.ready or record.supervisor.pid != process.pid:
        if process.poll() is not None:
            raise ServiceDied(f"`popalign up` ended: {log.read_text(errors='replace').strip()}")
        time.sleep(0.3)
    console.print(escape(log.read_text().strip()))


def _say(line: str) -> None:
    console.print(escape(line))


def _main() -> None:
    from popalign_core.errors import PopalignError
    from storage.errors import StorageError

    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    for command in (up, down, setup):
        program.command()(command)
    try:
        program()
    except (PopalignError, StorageError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
