"""A step in micro-batches is the step in one: same loss, same gradient, whatever the objective and the safeguards."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from two_groups import EMA_SETTINGS, SETTINGS, TwoGroupDenoiser, data_of, without_time

from popalign_core.alignment.accumulation import accumulate_gradient
from popalign_core.alignment.adapters import FullPolicy, Policy, copy_weights
from popalign_core.alignment.cache import AlignmentData, draw_batch, split_batch
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.processes import Processes
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import train
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import PassOptions, make_policy

VARIANTS: dict[str, dict[str, Any]] = {
    "popalign": {},
    "popalign_exact": {"objective": "popalign_exact", "pairs_per_step": 30},
    "dpo": {"objective": "dpo"},
    "sft": {"objective": "sft"},
    "safeguards": {"anchor_weight": 3.0, "winner_preserving": True, "preserve_weight": 5.0},
}


def moved_policy() -> FullPolicy:
    """Away from its reference, so that the baseline is not 0 and every pair has another weight."""
    policy = FullPolicy(TwoGroupDenoiser(0.9))
    with torch.no_grad():
        policy.denoiser.get_parameter("logits").add_(torch.tensor([0.4, -0.3]))
    return policy


def loss_and_gradient(
    policy: Policy, data: AlignmentData, settings: AlignmentSettings, timesteps: int = 100
) -> tuple[float, torch.Tensor]:
    batch = draw_batch(data, settings, 0, timesteps)
    for parameter in policy.denoiser.parameters():
        parameter.grad = None
    processes = Processes()
    found = accumulate_gradient(policy, batch, settings, processes, processes.autocast)
    gradients = [p.grad.flatten() for p in policy.denoiser.parameters() if p.grad is not None]
    return found.loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_the_loss_and_the_gradient_of_the_whole(name: str, micro_batch: int) -> None:
    data = data_of(winner_caption=np.zeros(40, np.int64))
    whole = replace(SETTINGS, **VARIANTS[name])
    expected, gradient = loss_and_gradient(moved_policy(), data, whole)
    loss, accumulated = loss_and_gradient(moved_policy(), data, replace(whole, micro_batch=micro_batch))
    # Some thirty sums of terms of either sign, each rounded to 2^-24 of its size.
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(accumulated, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_a_baseline_of_each_micro_batch_would_be_another_gradient() -> None:
    """The tolerance above would see it."""
    data = data_of()
    _, gradient = loss_and_gradient(moved_policy(), data, SETTINGS)
    parts = split_batch(draw_batch(data, SETTINGS, 0, 100), 2)
    policy, processes = moved_policy(), Processes()
    for part in parts:
        accumulate_gradient(policy, replace(part, global_pairs=8), SETTINGS, _Alone(), processes.autocast)
    naive = policy.denoiser.get_parameter("logits").grad
    assert naive is not None
    assert (naive - gradient).norm() > 1e-2 * gradient.norm()


class _Alone(Processes):
    """Takes the means of its own pairs for those of all."""

    def mean_over_pairs(self, local_means: torch.Tensor, *_: int) -> torch.Tensor:
        return local_means


@pytest.fixture(scope="module")
def emoji_data() -> AlignmentData:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    return AlignmentData(
        latent_means=torch.randn((8, 8, 16, 16), generator=torch.Generator().manual_seed(0)),
        winner=torch.arange(4),
        loser=torch.arange(4, 8),
        caption=torch.tensor([0, 0, 1, 1]),
        weight=torch.tensor([0.5, 1.5, 1.0, 1.0]),
        population=torch.tensor([0, 0, 1, 1]),
        **model.encode_captions(["a photo of a judge", "a photo of a cook"]),
    )


def emoji_policy(**passes: bool) -> Policy:
    model = load_sdxl(ModelSource("emoji"), device="cpu", dtype="float32")
    policy = make_policy(model, lora_rank=0, trainable="conditioning", seed=0, passes=PassOptions(**passes))
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.02)
    return policy


def test_micro_batches_of_a_unet_agree_up_to_rounding(emoji_data: AlignmentData) -> None:
    settings = AlignmentSettings(pairs_per_step=4, beta=500.0, timestep_sampling="stratified")
    whole, gradient = loss_and_gradient(emoji_policy(), emoji_data, settings, 1000)
    loss, accumulated = loss_and_gradient(
        emoji_policy(gradient_checkpointing=True), emoji_data, replace(settings, micro_batch=1), 1000
    )
    # Another batch shape rounds otherwise: errors below 1 by some 100 roundings of 2^-24, times beta = 500 in the
    # loss's exponent: 3e-3 if all were off the same way, a tenth of it without a common sign.
    assert loss == pytest.approx(whole, abs=3e-4)
    assert (accumulated - gradient).norm() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("objective", ["popalign", "popalign_exact"])
def test_a_resumed_run_of_micro_batches_is_the_undisturbed_one(tmp_path: Path, objective: str) -> None:
    settings = replace(EMA_SETTINGS, micro_batch=3, objective=objective, winner_preserving=True, spike_limit=50.0)  # pyright: ignore
    data = data_of()
    whole = begin(FullPolicy(TwoGroupDenoiser(0.9)), settings)
    expected = list(train(whole.policy, data, settings, state=whole))
    stopped = begin(FullPolicy(TwoGroupDenoiser(0.9)), settings)
    first = list(islice(train(stopped.policy, data, settings, state=stopped), 2))
    save_state(stopped, tmp_path)
    resumed = load_state(FullPolicy(TwoGroupDenoiser(0.9)), settings, tmp_path)
    rest = list(train(resumed.policy, data, settings, state=resumed))
    assert without_time(first + rest) == without_time(expected)
    assert torch.equal(copy_weights(resumed.policy.denoiser)["logits"], copy_weights(whole.policy.denoiser)["logits"])
    assert resumed.average is not None
    assert whole.average is not None
    assert torch.equal(resumed.average["logits"], whole.average["logits"])
    assert resumed.recent_losses == whole.recent_losses == [record.loss for record in expected]
