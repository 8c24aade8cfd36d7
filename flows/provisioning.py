"""What a Prefect server needs to know of popalign: pools, deployments, automations, and where stages run."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import httpx
import prefect
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.variables import Variable

from flows.notifications import ensure, notification_block, notifications, zombies
from flows.pools import CPU_POOL, GPU_POOL, PLACEMENT_VARIABLE
from popalign_core.errors import InvalidInput, PopalignError

POOLS = {
    CPU_POOL: "popalign: whole runs, and stages that need no GPU",
    GPU_POOL: "popalign: sampling, classification and training; one worker a GPU",
}
DEPLOYED_VARIABLE = "popalign_deployed"
DECLARATION = "prefect.yaml"
SOURCES = ("flows", "tasks", "popalign_core", "storage")
ANSWER_SECONDS = 10.0
DEPLOY_SECONDS = 300.0
Placement = Literal["process", "workers"]


class DeployFailed(PopalignError):
    """`prefect deploy` refused the declared deployments."""


def server_address(api_url: str) -> str:
    """The address of a server that answers. api_url: empty = what Prefect is set to. Raises: InvalidInput."""
    url = (api_url or get_current_settings().api.url or "").rstrip("/")
    if not url:
        raise InvalidInput(
            "which server? Give --api-url http://HOST:4200/api or set PREFECT_API_URL, or start one with `popalign up`."
        )
    try:
        answer = httpx.get(f"{url}/health", timeout=ANSWER_SECONDS, follow_redirects=True)
        healthy = answer.is_success and answer.json() is True
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise InvalidInput(
            f"no Prefect server answers at {url} ({error}): start it, or correct the address."
        ) from error
    if not healthy:
        raise InvalidInput(
            f"what answers at {url} is no Prefect API: its address ends in /api, as in http://HOST:4200/api."
        )
    return url


def provision(
    api_url: str, project: Path, placement: Placement, notify: str = "", only_changed: bool = False
) -> list[str]:
    """Makes what is missing and brings the rest up to date; a second call changes nothing.

    Pools, paused schedules and disabled automations stay as an operator left them. notify: type/name of a block; empty
    = automations that notify are neither made nor touched. project: folder of prefect.yaml.
    only_changed: deployments that are there and whose sources are as they were are not made again.
    Returns: what was done, one sentence each. Raises: InvalidInput, DeployFailed.
    """
    with temporary_settings({PREFECT_API_URL: api_url}), get_client(sync_client=True) as client:
        # What can be refused is refused before anything is made.
        block = notification_block(client, notify, api_url.removesuffix("/api")) if notify else None
        done = [f"work pool {name}: {_ensure_pool(client, name)}" for name in POOLS]
        done.append(_deploy(client, project, api_url, only_changed))
        for automation in [zombies(), *(notifications(block) if block else [])]:
            done.append(f"automation {automation.name!r}: {ensure(client, automation)}")
        Variable.set(PLACEMENT_VARIABLE, placement, overwrite=True)
    done.append(f"variable {PLACEMENT_VARIABLE}: {placement}")
    return done


def _ensure_pool(client: SyncPrefectClient, name: str) -> str:
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(
            WorkPoolCreate(name=name, type="process", description=POOLS[name], base_job_template=template)
        )
    except ObjectAlreadyExists:
        return "kept"
    return "created"


def _deploy(client: SyncPrefectClient, project: Path, api_url: str, only_changed: bool) -> str:
    digest = _digest(project)
    known = Variable.get(DEPLOYED_VARIABLE, default={})
    there = [str(deployment.id) for deployment in _declared(client, project)]
    # Deploying loads every flow, with the models' libraries.
    if only_changed and isinstance(known, dict) and known == {"digest": digest, "deployments": sorted(there)}:
        return f"deployments of {project / DECLARATION}: unchanged since they were made"
    _call_deploy(project, api_url)
    made = sorted(str(deployment.id) for deployment in _declared(client, project))
    Variable.set(DEPLOYED_VARIABLE, {"digest": digest, "deployments": made}, overwrite=True)
    return f"deployments of {project / DECLARATION}: {len(made)}, up to date"


def _declared(client: SyncPrefectClient, project: Path) -> list[DeploymentResponse]:
    """Deployments on the server that have a name of those declared."""
    declaration = yaml.safe_load((project / DECLARATION).read_text(encoding="utf-8"))
    names = sorted({str(deployment["name"]) for deployment in declaration["deployments"]})
    return client.read_deployments(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=names)))


def _digest(project: Path) -> str:
    """Of all that decides what is deployed: where from, the declaration, and sources that hold parameters."""
    digest = hashlib.sha256(f"{project} {prefect.__version__}".encode())
    sources = (path for folder in SOURCES for path in (project / folder).rglob("*.py"))
    for path in [project / DECLARATION, *sorted(sources)]:
        digest.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _call_deploy(project: Path, api_url: str) -> None:
    """Prefect's own command, which knows the whole of prefect.yaml; without `active:` a pause survives it."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # A default pool would win over the pools that are declared.
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_DEFAULT_WORK_POOL_NAME"}
    environment |= {"PREFECT_API_URL": api_url, "NO_COLOR": "1", "COLUMNS": "200"}
    try:
        result = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, timeout=DEPLOY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeployFailed(
            f"`prefect deploy --all` in {project} took over {DEPLOY_SECONDS:.0f} s; is {api_url} overloaded?"
        ) from error
    if result.returncode:
        said = "\n".join((result.stdout + result.stderr).strip().splitlines()[-20:])
        raise DeployFailed(f"`prefect deploy --all` in {project} failed:\n{said}")
