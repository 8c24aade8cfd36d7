"""prefect.yaml: every entrypoint loads as a worker loads it, and the flow accepts the parameters declared for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.schema_tools.validation import validate

ROOT = Path(__file__).parents[2]
DECLARATION: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS: list[dict[str, Any]] = DECLARATION["deployments"]
STAGES = {"expansion", "sampling", "classification", "populations", "alignment", "assessment"}
each_deployment = pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["entrypoint"])


def load_flow(deployment: dict[str, Any]) -> Flow[..., Any]:
    """The flow of an entrypoint, from its file; a flow that cannot be loaded raises instead of being stood in for."""
    file, function = deployment["entrypoint"].split(":")
    return load_flow_from_entrypoint(f"{ROOT / file}:{function}", use_placeholder_flow=False)


def test_the_whole_pipeline_and_each_stage_are_declared_once():
    assert sorted(Path(deployment["entrypoint"].split(":")[0]).stem for deployment in DEPLOYMENTS) == sorted(
        {"debias", *STAGES}
    )


@each_deployment
def test_the_entrypoint_loads_and_has_help(deployment: dict[str, Any]):
    flow = load_flow(deployment)
    assert flow.fn.__name__ == deployment["entrypoint"].split(":")[1]
    assert deployment["description"]
    assert deployment["work_pool"] == {"name": "popalign-cpu"}


@each_deployment
def test_the_flow_accepts_the_declared_parameters(deployment: dict[str, Any]):
    """What a stage needs besides (a reference to its input) is given when it is started."""
    flow = load_flow(deployment)
    parameters = deployment.get("parameters", {})
    schema = flow.parameters.model_dump(by_alias=True)
    assert set(parameters) <= set(schema["properties"])
    validate(parameters, schema, raise_on_error=True, ignore_required=True)


def test_the_whole_pipeline_starts_without_further_input():
    deployment = next(
        deployment for deployment in DEPLOYMENTS if deployment["entrypoint"].startswith("flows/debias.py")
    )
    load_flow(deployment).validate_parameters(deployment.get("parameters", {}))
