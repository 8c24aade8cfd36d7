"""What a model is made of is read from its own configuration, or said not to be known."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_pipelines import write_stable_diffusion, write_stable_diffusion_3

from popalign_core.models import architecture
from popalign_core.models.architecture import SDXL_ID, ArchitectureUnknown, architecture_of
from popalign_core.models.families import FAMILIES


def hub_of(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path]) -> None:
    def found(model: str, name: str) -> Path:
        if model not in files:
            raise OSError(f"{model} is not in the cache")
        return files[model] / name

    architecture._of_hub.cache_clear()
    monkeypatch.setattr(architecture, "_from_hub", found)


@pytest.mark.parametrize("write", [write_stable_diffusion, write_stable_diffusion_3])
def test_what_is_in_the_hubs_cache_is_counted_as_a_folder_is(write, tmp_path, monkeypatch):
    folder = write(tmp_path / "model")
    hub_of(monkeypatch, {"somebody/else": folder})
    cached, local = architecture_of("somebody/else"), architecture_of(str(folder))
    assert cached == replace(local, source="the configuration of somebody/else")
    assert FAMILIES[local.family.pipeline] is local.family


def test_a_hub_id_that_is_not_known_does_not_get_sdxls_figures(monkeypatch):
    hub_of(monkeypatch, {})
    assert architecture_of(SDXL_ID).source == "SDXL's configuration, as shipped"
    for model in ("stabilityai/stable-diffusion-3.5-medium", "/nowhere/at/all"):
        with pytest.raises(ArchitectureUnknown, match=f"not counted for {model}"):
            architecture_of(model)


def test_weights_that_lie_there_twice_are_counted_once(tmp_path):
    folder = write_stable_diffusion(tmp_path / "model")
    before = architecture_of(str(folder))
    weights = folder / "text_encoder" / "model.safetensors"
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(weights.read_bytes())
    architecture._of_folder.cache_clear()
    assert architecture_of(str(folder)) == before
    with safe_open(weights, "numpy") as file:
        assert before.text_elements == sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
