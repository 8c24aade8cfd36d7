"""A model of every family goes the whole way of a round: drawn, trained, handed over, opened by plain diffusers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prefect.logging import disable_run_logger
from test_tasks_registry import commit_preferences, working_in
from tiny_pipelines import write_stable_diffusion, write_stable_diffusion_3

from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, sample_images
from storage.layout import Workspace
from storage.tables import read_artifact
from tasks.alignment import align_round
from tasks.inputs import check_inputs
from tasks.registry import export_model
from tasks.run import BASE, loaded_model, model_source, record_run, sampling_settings

CAPTION = "a photo of a judge"
SETTINGS = {
    "device": "cpu",
    "expansion.axes": "perceived_gender",
    "sampling.steps": "2",
    "sampling.batch_size": "1",
    "alignment.steps": "2",
    "alignment.pairs_per_step": "2",
    "alignment.preserve_weight": "0",
    "alignment.first_timestep": "0",
    # So far from the base that nobody could take the one for the other.
    "alignment.learning_rate": "0.02",
}
MODELS = {"noise": (write_stable_diffusion, "ddim"), "flow": (write_stable_diffusion_3, "flow-euler")}


def drawn(place: Workspace, config: RunConfig, model_id: str) -> np.ndarray:
    model = loaded_model(model_source(str(place.root), "run", config, model_id), "cpu", "float32")
    settings = sampling_settings(config.sampling, config.acceleration)
    (image,) = next(sample_images(model, [ImageRequest("s", "p", CAPTION, 0, 3)], settings))
    return image.pixels.astype(int)


def opened(folder: Path) -> Any:
    """What the three lines of the card make."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 3
    found: dict[str, Any] = {}
    with working_in(folder):
        exec(code, found)
    found["pipe"].set_progress_bar_config(disable=True)
    return found["pipe"]


@pytest.mark.parametrize("rank", ["0", "2"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_round_of_another_family(kind: str, rank: str, tmp_path: Path) -> None:
    write, scheduler = MODELS[kind]
    more = {"model": str(write(tmp_path / "base")), "sampling.scheduler": scheduler, "alignment.lora_rank": rank}
    if kind == "flow" and rank != "0":
        more["alignment.learning_rate"] = "0.2"  # two steps of a new adapter move a transformer little
    config = with_settings(preset("emoji"), SETTINGS | more)
    check_inputs(config)
    place = Workspace.open(tmp_path / "workspace")
    record_run(str(place.root), "run", "emoji", config)
    with disable_run_logger():
        ref = align_round.fn(commit_preferences(place, "run"), config, BASE, 1)
    losses = [row["loss"] for row in read_artifact(ref, "training_steps")]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5), "the policy is the reference at the first step"
    assert losses[1] != losses[0]
    assert read_artifact(ref, "models")[0]["natural_beta"] > 0

    before, after = (drawn(place, config, model_id) for model_id in (BASE, "round-1"))
    assert np.abs(after - before).mean() > 1
    plain = opened(export_model(str(place.root), "run", "round-1", tmp_path / "export"))
    generator = torch.Generator().manual_seed(3)
    image = plain(
        CAPTION,
        num_inference_steps=2,
        guidance_scale=config.sampling.guidance_scale,
        generator=generator,
        output_type="np",
    ).images[0]
    assert np.abs(np.round(image * 255) - after).max() <= 1
