"""What `popalign setup` makes on a server: once, whatever was there, and without undoing what an operator did."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import EventTrigger
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.templating import apply_values, find_placeholders
from prefect.variables import Variable

from flows.notifications import FAILED, WITHOUT_PROCESS, zombies
from flows.pools import PLACEMENT_VARIABLE
from flows.provisioning import DEPLOYED_VARIABLE, POOLS, DeployFailed, provision, server_address
from flows.services_cli import setup
from popalign_core.errors import InvalidInput

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docs" / "kubernetes" / "popalign-gpu-job-template.json"
NOTICES = {"popalign: run failed", "popalign: run crashed", "popalign: run late", "popalign: disparity drifted"}
DECLARATION = """\
name: tiny
deployments:
  - name: tiny-nightly
    entrypoint: flows/tiny.py:tiny
    tags: [popalign]
    work_pool: {name: popalign-cpu}
    schedules: [{cron: "30 2 * * *", timezone: Europe/Berlin, slug: nightly}]
"""
FLOW = """\
from prefect import flow

@flow(name="tiny")
def tiny(number: int = 1) -> int:
    return number
"""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a declaration of its own: popalign's flows take long to load."""
    root = tmp_path_factory.mktemp("project")
    (root / "flows").mkdir()
    (root / "flows" / "tiny.py").write_text(FLOW)
    (root / "prefect.yaml").write_text(DECLARATION)
    return root


@pytest.fixture(scope="module")
def api_url() -> Generator[str]:
    with prefect_test_harness(server_startup_timeout=180):
        url = get_current_settings().api.url
        assert url
        yield url


@pytest.fixture(scope="module")
def client(api_url: str) -> Generator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        assert str(client.api_url).startswith(api_url)
        yield client


@pytest.fixture(scope="module")
def provisioned(client: SyncPrefectClient, api_url: str, project: Path) -> list[str]:
    # A pool that somebody made and paused before.
    client.create_work_pool(WorkPoolCreate(name="popalign-gpu", type="process", is_paused=True))
    client.update_work_pool("popalign-gpu", WorkPoolUpdate(concurrency_limit=3, is_paused=True))
    return provision(api_url, project, "workers")


def automations(client: SyncPrefectClient) -> dict[str, Any]:
    found = client.read_automations()
    names = [automation.name for automation in found]
    assert len(set(names)) == len(names)
    return {automation.name: automation for automation in found}


def test_all_is_made_once(client: SyncPrefectClient, api_url: str, project: Path, provisioned: list[str]):
    assert "work pool popalign-cpu: created" in provisioned
    before, deployments = automations(client), client.read_deployments()
    assert set(before) == {"popalign: zombies"}
    assert [deployment.name for deployment in deployments] == ["tiny-nightly"]
    assert {pool.name for pool in client.read_work_pools()} >= set(POOLS)

    again = provision(api_url, project, "workers", only_changed=True)
    assert f"deployments of {project / 'prefect.yaml'}: unchanged since they were made" in again
    assert "automation 'popalign: zombies': kept" in again
    assert {name: automation.id for name, automation in automations(client).items()} == {
        name: automation.id for name, automation in before.items()
    }


@pytest.mark.usefixtures("provisioned")
def test_pools_stay_as_an_operator_left_them(client: SyncPrefectClient):
    pool = client.read_work_pool("popalign-gpu")
    assert (pool.is_paused, pool.concurrency_limit) == (True, 3)
    assert {client.read_work_pool(name).type for name in POOLS} == {"process"}


@pytest.mark.usefixtures("provisioned")
def test_a_paused_schedule_and_a_disabled_automation_stay_so(client: SyncPrefectClient, api_url: str, project: Path):
    deployment = client.read_deployments()[0]
    client.update_deployment_schedule(deployment.id, deployment.schedules[0].id, active=False)
    dead = automations(client)["popalign: zombies"]
    client.update_automation(dead.id, zombies().model_copy(update={"enabled": False, "description": "edited"}))

    done = provision(api_url, project, "workers")

    schedules = client.read_deployments()[0].schedules
    assert [schedule.active for schedule in schedules] == [False]
    assert "automation 'popalign: zombies': updated" in done
    now = automations(client)["popalign: zombies"]
    assert (now.id, now.enabled, now.description) == (dead.id, False, zombies().description)


@pytest.mark.usefixtures("provisioned")
def test_deployments_are_made_again_where_one_is_gone_or_a_source_changed(
    client: SyncPrefectClient, api_url: str, project: Path
):
    client.delete_deployment(client.read_deployments()[0].id)
    done = provision(api_url, project, "workers", only_changed=True)
    assert f"deployments of {project / 'prefect.yaml'}: 1, up to date" in done
    (project / "flows" / "tiny.py").write_text(FLOW.replace("number: int = 1", "number: int = 2"))
    provision(api_url, project, "workers", only_changed=True)
    assert client.read_deployments()[0].parameter_openapi_schema["properties"]["number"]["default"] == 2


@pytest.mark.usefixtures("provisioned")
def test_the_variable_says_where_stages_run(client: SyncPrefectClient, api_url: str, project: Path):
    assert Variable.get(PLACEMENT_VARIABLE) == "workers"
    provision(api_url, project, "process", only_changed=True)
    assert Variable.get(PLACEMENT_VARIABLE) == "process"
    known = Variable.get(DEPLOYED_VARIABLE)
    assert isinstance(known, dict)
    assert known["deployments"] == [str(client.read_deployments()[0].id)]


@pytest.mark.usefixtures("provisioned")
def test_notices_go_to_the_named_block_and_to_another_one_later(client: SyncPrefectClient, api_url: str, project: Path):
    hook = CustomWebhookNotificationBlock(name="hook", url="http://127.0.0.1:1")
    blocks = {name: hook.save(name) for name in ("ops", "night")}
    for name, outcome in (("ops", "created"), ("ops", "kept"), ("night", "updated")):
        done = provision(api_url, project, "workers", f"custom-webhook/{name}", only_changed=True)
        assert {f"automation {notice!r}: {outcome}" for notice in NOTICES} <= set(done)
        told = {notice: automations(client)[notice].actions[0].block_document_id for notice in NOTICES}
        assert set(told.values()) == {blocks[name]}
    # Without --notify they stay.
    provision(api_url, project, "workers", only_changed=True)
    assert set(automations(client)) >= NOTICES


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("slack-webhook/nobody", "blocks/catalog/slack-webhook/create with the name nobody"),
        ("no-such-type/ops", "there is no block no-such-type/ops"),
        ("ops", "write type/name, as in slack-webhook/ops"),
        ("secret/quiet", "secret/quiet cannot notify"),
    ],
)
@pytest.mark.usefixtures("provisioned")
def test_a_block_that_cannot_be_used_is_refused(api_url: str, project: Path, block: str, said: str):
    Secret(value="x").save("quiet", overwrite=True)
    with pytest.raises(InvalidInput, match=said):
        provision(api_url, project, "process", block)


@pytest.mark.usefixtures("provisioned")
def test_what_prefect_says_of_a_bad_declaration_is_shown(api_url: str, tmp_path: Path):
    (tmp_path / "prefect.yaml").write_text(DECLARATION)
    with pytest.raises(DeployFailed, match=r"flows/tiny\.py"):
        provision(api_url, tmp_path, "process")


def test_an_address_without_a_server_is_refused(api_url: str):
    assert server_address(api_url + "/") == server_address("") == api_url
    with pytest.raises(InvalidInput, match="no Prefect server answers"):
        server_address("http://127.0.0.1:9/api")
    with pytest.raises(InvalidInput, match="ends in /api"):
        server_address(api_url.removesuffix("/api"))


def test_bad_arguments_are_refused_before_a_server_is_asked(tmp_path: Path):
    with pytest.raises(InvalidInput, match="'elsewhere' is no placement: workers or process"):
        setup("elsewhere")
    with pytest.raises(InvalidInput, match=r"does not hold prefect\.yaml and flows/"):
        setup(project=tmp_path)


def test_the_zombie_automation_knows_every_end_of_a_run():
    """A state of ours that it did not know would end a finished run as crashed."""
    from flows.outcome import HELD, QUALITY_GATE_FAILED

    trigger = zombies().trigger
    assert isinstance(trigger, EventTrigger)
    assert {HELD, QUALITY_GATE_FAILED} <= FAILED
    assert {f"prefect.flow-run.{state}" for state in WITHOUT_PROCESS} < trigger.expect


def test_kubernetes_pool_gives_a_run_a_gpu_and_the_workspace(client: SyncPrefectClient):
    template = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    pool = client.create_work_pool(WorkPoolCreate(name="on-kubernetes", type="kubernetes", base_job_template=template))
    variables = pool.base_job_template["variables"]["properties"]
    used = {placeholder.name for placeholder in find_placeholders(template["job_configuration"])}
    assert used == set(variables)

    values = {name: variable["default"] for name, variable in variables.items() if "default" in variable}
    job = apply_values(pool.base_job_template["job_configuration"], values)
    pod = job["job_manifest"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    assert job["env"]["POPALIGN_WORKSPACE"] == container["volumeMounts"][0]["mountPath"] == "/workspace"
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "popalign-workspace"}
