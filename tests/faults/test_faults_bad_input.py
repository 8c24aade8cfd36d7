"""Models, sizes, prompts and workspaces that cannot be used: one message, exit code 2, and nothing committed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.cli import main
from flows.expansion import expansion
from popalign_core.config import ExpansionConfig
from popalign_core.errors import PopalignError
from popalign_core.models.checkpoints import EMBEDDED
from popalign_core.presets import preset
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
    assert "is a FluxPipeline; supported are StableDiffusionXLPipeline, " in refused(f"model={model}")


def test_a_unet_of_another_architecture(refused: Refused, model: Path) -> None:
    config = model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "addition_embed_type": None}))
    assert "a UNet of SDXL has 'text_time'" in refused(f"model={model}")


@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "vae/config.json"])
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_settings_of_a_model_that_cannot_be_read(refused: Refused, model: Path, part: str, content: str | None) -> None:
    if content is None:
        (model / part).unlink()
    else:
        (model / part).write_text(content)
    assert Path(part).name in refused(f"model={model}")


def test_a_lora_that_is_not_there_or_a_pickle(refused: Refused, tmp_path: Path) -> None:
    assert "there is no LoRA folder" in refused(f"model_lora={tmp_path}/nowhere")
    (tmp_path / "pytorch_lora_weights.bin").touch()
    assert "pickled weights (pytorch_lora_weights.bin)" in refused(f"model_lora={tmp_path}")


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


def test_an_empty_prompt_list(refused: Refused) -> None:
    assert "unknown prompt set ''" in refused("expansion.prompts=")
    with pytest.raises(ValidationError, match="at least 1 item"):
        ExpansionConfig(prompts=())


def test_a_prompt_list_without_prompts_to_judge_on(refused: Refused) -> None:
    said = refused("expansion.prompts=train:cook")
    assert "has no prompts for validation and eval" in said


def test_a_neutral_prompt_that_names_a_group(refused: Refused) -> None:
    assert "policeman" in refused("expansion.prompts=train:policeman,validation:cook,eval:judge")


def test_a_subject_in_two_splits(refused: Refused) -> None:
    assert "cook" in refused("expansion.prompts=train:cook,validation:judge,eval:a cook")


def test_a_refused_prompt_list_leaves_the_run_id_free(tmp_path: Path) -> None:
    """Also where nobody looked before: a flow that is started by a deployment."""
    bad = preset("emoji").model_copy(update={"expansion": ExpansionConfig(prompts=("train:policeman",))})
    with pytest.raises(PopalignError, match="policeman"):
        expansion.fn("r", "emoji", str(tmp_path), bad)
    assert list(tmp_path.glob("runs/r/*/*/manifest.json")) == []


def test_a_judge_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no folder" in refused(f"classification.judge={tmp_path}/nowhere")


def test_a_judge_without_a_head_for_an_axis(refused: Refused, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(EMBEDDED["emoji-heads"], tmp_path / "heads"))
    shutil.rmtree(heads / "perceived_skin_tone")
    assert "has no classifier for perceived_skin_tone" in refused(f"classification.judge={heads}")


def test_a_judge_that_tells_unknown_groups_apart(refused: Refused, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(EMBEDDED["emoji-heads"], tmp_path / "heads"))
    config = heads / "perceived_gender" / "config.json"
    config.write_text(config.read_text().replace('"woman"', '"robot"'))
    assert "robot" in refused(f"classification.judge={heads}")


def test_a_builder_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    assert "there is no folder" in refused(f"classification.builder={tmp_path}/nowhere")


@pytest.mark.parametrize("device", ["gpuu", "cuda:77"])
def test_a_device_that_is_not_there(refused: Refused, device: str) -> None:
    assert f"device is '{device}', which cannot be used here" in refused(f"device={device}")


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
