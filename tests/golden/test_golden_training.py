"""Twenty steps of PopAlign on the emoji model, compared point by point with the recorded ones."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import make_policy

GOLDEN = Path(__file__).parent / "training.json"
COLUMNS = ("loss", "implicit_accuracy", "winner_margin", "loser_margin", "gradient_norm")
SETTINGS = AlignmentSettings(
    steps=20, pairs_per_step=4, beta=500.0, anchor_weight=100.0, timestep_sampling="stratified", seed=7
)
CAPTIONS = ("a photo of a firefighter", "a photo of a judge")
# Rounding differs between processors, and twenty steps amplify it: points may stray, their mean may not.
POINT, MEAN = 2e-2, 5e-3


def trajectory() -> dict[str, list[float]]:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    rng = torch.Generator().manual_seed(0)
    data = AlignmentData(
        latent_means=torch.randn((8, 8, 16, 16), generator=rng),
        winner=torch.arange(4),
        loser=torch.arange(4, 8),
        caption=torch.tensor([0, 0, 1, 1]),
        weight=torch.tensor([0.5, 1.5, 1.0, 1.0]),
        population=torch.tensor([0, 0, 1, 1]),
        **model.encode_captions(CAPTIONS),
    )
    records = list(train(make_policy(model, lora_rank=0, seed=0), data, SETTINGS))
    return {name: [getattr(record, name) for record in records] for name in COLUMNS}


def test_twenty_steps_are_as_recorded(update_golden: bool) -> None:
    found = trajectory()
    if update_golden:
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        facts = {"machine": platform.machine(), "versions": versions, "columns": found}
        GOLDEN.write_text(json.dumps(facts, indent=1) + "\n")
    recorded = json.loads(GOLDEN.read_text())["columns"]
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        expected, got = np.array(values), np.array(found[name])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=POINT * scale, err_msg=name)
        assert np.mean(got - expected) == pytest.approx(0, abs=MEAN * scale), name


def test_the_recorded_steps_do_move() -> None:
    recorded = json.loads(GOLDEN.read_text())["columns"]
    assert recorded["winner_margin"][0] == recorded["loser_margin"][0] == 0
    assert recorded["winner_margin"][-1] > 0
    assert len(recorded["loss"]) == SETTINGS.steps
