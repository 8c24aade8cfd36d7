"""On a card: a killed training goes on bit for bit, where torch's kernels add in a fixed order."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from emoji_pairs import emoji_pairs

from popalign_core.alignment.adapters import Policy, copy_weights
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.models.attention import attention_backend
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import PassOptions, make_policy

SETTINGS = AlignmentSettings(steps=4, pairs_per_step=2, ema_decay=0.9, mixed_precision=True, seed=1)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """cuBLAS reads its workspace when it is first used; run this file in a process of its own."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def start(rank: int) -> tuple[Policy, AlignmentData]:
    model = load_sdxl(ModelSource("emoji"), device="cuda", dtype="float32")
    data = emoji_pairs(model)
    return make_policy(model, lora_rank=rank, seed=0, passes=PassOptions(mixed_precision=True)), data


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_training_goes_on_bit_for_bit(rank: int, tmp_path: Path) -> None:
    with attention_backend("math"):
        policy, data = start(rank)
        whole = begin(policy, SETTINGS)
        list(train(policy, data, SETTINGS, state=whole))

        stopped, _ = start(rank)
        state = begin(stopped, SETTINGS)
        list(islice(train(stopped, data, SETTINGS, state=state), 2))
        save_state(state, tmp_path)
        resumed, _ = start(rank)
        again = load_state(resumed, SETTINGS, tmp_path)
        list(train(resumed, data, SETTINGS, state=again))
    expected, got = copy_weights(policy.denoiser), copy_weights(resumed.denoiser)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert whole.average is not None
    assert again.average is not None
    assert all(torch.equal(again.average[name], mean) for name, mean in whole.average.items())
