"""prefect.yaml: every entrypoint loads as a worker loads it, and the flow accepts the parameters declared for it."""

from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.schema_tools.validation import validate

from flows.dispatch import GPU_DEPLOYMENT
from flows.pools import GPU_POOL
from popalign_core.presets import PRESETS

ROOT = Path(__file__).parents[2]
DECLARATION: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS: list[dict[str, Any]] = DECLARATION["deployments"]
ON_GPU = {"sampling", "classification", "training", "measurement"}
ON_CPU = {"expansion", "populations", "alignment", "assessment", "sampler_comparison"}
WHOLE = {"debias", "debias-sdxl", "debias-sdxl-paper"}
each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: f"{stem(one)}-{one['name']}")


def stem(deployment: dict[str, Any]) -> str:
    return Path(deployment["entrypoint"].split(":")[0]).stem


def load_flow(deployment: dict[str, Any]) -> Flow[..., Any]:
    """The flow of an entrypoint, from its file; a flow that cannot be loaded raises instead of being stood in for."""
    file, function = deployment["entrypoint"].split(":")
    return load_flow_from_entrypoint(f"{ROOT / file}:{function}", use_placeholder_flow=False)


def test_what_is_declared():
    names = sorted((stem(deployment), deployment["name"]) for deployment in DEPLOYMENTS)
    stages = [(stage, "gpu") for stage in ON_GPU] + [(stage, "cpu") for stage in ON_CPU]
    assert names == sorted([("nightly", "debias-nightly"), *(("debias", name) for name in WHOLE), *stages])


@each_deployment
def test_the_entrypoint_loads_and_has_help(deployment: dict[str, Any]):
    flow = load_flow(deployment)
    assert flow.fn.__name__ == deployment["entrypoint"].split(":")[1]
    assert flow.name == stem(deployment)
    assert deployment["description"]
    assert "popalign" in deployment["tags"]


@each_deployment
def test_the_pool_fits_the_work(deployment: dict[str, Any]):
    gpu = stem(deployment) in ON_GPU
    assert deployment["work_pool"] == {"name": GPU_POOL if gpu else "popalign-cpu"}
    if gpu:  # `dispatch` asks for it by this name
        assert deployment["name"] == GPU_DEPLOYMENT


@each_deployment
def test_the_flow_accepts_the_declared_parameters(deployment: dict[str, Any]):
    """What a stage needs besides (a reference to its input) is given when it is started."""
    flow = load_flow(deployment)
    parameters = deployment.get("parameters", {})
    schema = flow.parameters.model_dump(by_alias=True)
    assert set(parameters) <= set(schema["properties"])
    validate(parameters, schema, raise_on_error=True, ignore_required=True)


@each_deployment
def test_every_field_of_the_form_has_a_title_and_help(deployment: dict[str, Any]):
    schema = load_flow(deployment).parameters.model_dump(by_alias=True)
    for name, field in schema["properties"].items():
        assert field.get("description"), name
    for model in schema.get("definitions", {}).values():
        for name, field in model.get("properties", {}).items():
            assert field.get("title"), (model["title"], name)
    assert "SecretStr" not in str(schema)
    assert "password" not in str(schema)


@pytest.mark.parametrize(
    "deployment", [one for one in DEPLOYMENTS if stem(one) == "debias"], ids=lambda one: one["name"]
)
def test_the_form_is_filled_with_the_preset(deployment: dict[str, Any]):
    """On a change of presets copy the expected values here: python -c 'print(preset("emoji").model_dump_json())'."""
    parameters = deployment["parameters"]
    assert parameters["config"] == PRESETS[parameters["preset_name"]].model_dump(mode="json")
    load_flow(deployment).validate_parameters(parameters)


def test_the_nightly_run_has_a_schedule_that_an_operator_can_pause():
    (nightly,) = [deployment for deployment in DEPLOYMENTS if stem(deployment) == "nightly"]
    (schedule,) = nightly["schedules"]
    ZoneInfo(schedule["timezone"])
    # `active: true` would start a paused schedule again with the next deploy.
    assert "active" not in schedule
    assert {"preset_name", "model"} <= nightly["parameters"].keys()
    load_flow(nightly).validate_parameters(nightly["parameters"])


def test_a_restart_of_the_server_ends_no_run():
    """Leases of a concurrency limit are lost with it, and Prefect 3.8 then ends the run that held one."""
    assert not [deployment["name"] for deployment in DEPLOYMENTS if "concurrency_limit" in deployment]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"config": {"sampling": {"steps": 0}}}, "steps"),
        ({"preset_name": "sdxxl"}, "preset_name"),
        ({"execution": {"placement": "moon"}}, "placement"),
        ({"config": {"speed": 3}}, "speed"),
    ],
)
def test_a_wrong_value_is_refused_before_the_flow_starts(wrong: dict[str, Any], message: str):
    (debias,) = [deployment for deployment in DEPLOYMENTS if deployment["name"] == "debias"]
    flow = load_flow(debias)
    with pytest.raises(Exception, match=message):
        flow.validate_parameters(debias["parameters"] | wrong)
    with pytest.raises(Exception, match=message):
        validate(debias["parameters"] | wrong, flow.parameters.model_dump(by_alias=True), raise_on_error=True)
