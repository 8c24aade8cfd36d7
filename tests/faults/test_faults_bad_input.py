"""Models, sizes, prompts and workspaces that cannot be used: one message, exit code 2, and nothing committed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import main
from popalign_core.models.checkpoints import EMBEDDED
from storage.layout import Workspace
from storage.locks import run_lock

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Starts a run with these settings and gives what it said."""

    def start(*settings: str) -> str:
        options = [part for setting in settings for part in ("--set", setting)]
        arguments = ["popalign", "run", "emoji", "--run-id", "r", "-w", str(tmp_path / "workspace"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert list(tmp_path.glob("workspace/runs/*/*/*/manifest.json")) == []
        said = " ".join(capsys.readouterr().err.split())
        assert "Traceback" not in said
        return said

    return start


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED["emoji"], tmp_path / "model"))


def test_a_folder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no model folder" in refused(f"model={tmp_path}/nowhere")


def test_a_folder_without_a_pipeline(refused: Refused, tmp_path: Path) -> None:
    assert "holds no model_index.json" in refused(f"model={tmp_path}")


def test_a_folder_without_a_unet(refused: Refused, model: Path) -> None:
    shutil.rmtree(model / "unet")
    assert "has no unet/ folder" in refused(f"model={model}")


def test_a_pipeline_of_another_architecture(refused: Refused, model: Path) -> None:
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    assert "is a FluxPipeline; StableDiffusionXLPipeline is the architecture supported" in refused(f"model={model}")


def test_a_unet_of_another_architecture(refused: Refused, model: Path) -> None:
    config = model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "addition_embed_type": None}))
    assert "an SDXL UNet has 'text_time'" in refused(f"model={model}")


def test_pickled_weights(refused: Refused, model: Path) -> None:
    weights = next((model / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    assert "pickled weights (diffusion_pytorch_model.bin), which can run code" in refused(f"model={model}")


def test_no_weights(refused: Refused, model: Path) -> None:
    next((model / "vae").glob("*.safetensors")).unlink()
    assert "vae holds no safetensors weights" in refused(f"model={model}")


def test_an_image_size_that_does_not_fit_the_latent_grid(refused: Refused) -> None:
    said = refused("sampling.image_size=70")
    assert "70 x 70 is not divisible by 16" in said
    assert "the nearest is 64 x 64" in said


def test_an_empty_prompt_file(refused: Refused, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("")
    assert str(prompts) in refused(f"expansion.prompts=eval={prompts}")


def test_a_run_that_is_being_worked_on(refused: Refused, tmp_path: Path) -> None:
    with run_lock(Workspace.open(tmp_path / "workspace"), "r"):
        said = refused()
    assert "run 'r'" in said
    assert "choose another --run-id" in said


def test_a_newer_workspace(refused: Refused, tmp_path: Path) -> None:
    marker = tmp_path / "workspace" / "workspace.json"
    marker.parent.mkdir()
    marker.write_text(json.dumps({"schema_version": 99}))
    assert "was written with schema 99" in refused()
