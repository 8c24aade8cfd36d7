"""What AdamW keeps, in 32 and in 8 bits, goes through a checkpoint bit for bit."""

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from emoji_pairs import emoji_pairs
from two_groups import SETTINGS, TwoGroupDenoiser, data_of, without_time

from popalign_core.alignment.adapters import FullPolicy, copy_weights
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import make_policy


def test_eight_bits_without_the_extra_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InvalidInput, match=r"pip install 'popalign\[eight-bit\]'"):
        begin(FullPolicy(TwoGroupDenoiser(0.9)), replace(SETTINGS, optimizer="adamw_8bit"))


def test_a_checkpoint_from_before_a_setting_goes_on(tmp_path: Path) -> None:
    save_state(begin(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS), tmp_path)
    file = tmp_path / "state.json"
    file.write_text(file.read_text().replace('"micro_batch": null,', "").replace('"recent_losses": [],', ""))
    assert load_state(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS, tmp_path).step == 0
    with pytest.raises(InvalidInput, match="micro_batch = None, now it is 2"):
        load_state(FullPolicy(TwoGroupDenoiser(0.9)), replace(SETTINGS, micro_batch=2), tmp_path)


def emoji_data() -> AlignmentData:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    return emoji_pairs(model)


def test_eight_bit_moments_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """On the emoji UNet, and with the extra installed."""
    pytest.importorskip("bitsandbytes", reason="needs the extra eight-bit")
    data = emoji_data()
    settings = AlignmentSettings(steps=3, pairs_per_step=2, ema_decay=0.9, optimizer="adamw_8bit", seed=1)

    def start() -> FullPolicy:
        model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
        policy = make_policy(model, lora_rank=0, seed=0)
        assert isinstance(policy, FullPolicy)
        return policy

    whole = begin(start(), settings)
    expected = list(train(whole.policy, data, settings, state=whole))
    stopped = begin(start(), settings)
    first = list(islice(train(stopped.policy, data, settings, state=stopped), 2))
    save_state(stopped, tmp_path)
    resumed = load_state(start(), settings, tmp_path)
    assert without_time(first + list(train(resumed.policy, data, settings, state=resumed))) == without_time(expected)
    weights, wanted = copy_weights(resumed.policy.denoiser), copy_weights(whole.policy.denoiser)
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    moments = {moment.dtype for state in whole.optimizer.state.values() for moment in [state["state1"]]}
    assert moments == {torch.uint8, torch.float32}, "small parameters keep 32 bits"


def test_settings_name_an_optimizer_that_is_known() -> None:
    with pytest.raises(InvalidInput, match="adamw, adamw_8bit"):
        replace(SETTINGS, optimizer="sgd")  # pyright: ignore


def test_moments_follow_their_parameters(tmp_path: Path) -> None:
    state = begin(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS)
    list(islice(train(state.policy, data_of(), SETTINGS, state=state), 2))
    save_state(state, tmp_path)
    again = load_state(FullPolicy(TwoGroupDenoiser(0.9)), SETTINGS, tmp_path)
    (kept,), (found,) = state.optimizer.state.values(), again.optimizer.state.values()
    assert kept.keys() == found.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(kept[name], found[name]) for name in kept)
