"""A jump of the loss is seen, and nothing else is."""

import math
from dataclasses import replace
from itertools import islice
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from two_groups import SETTINGS, TwoGroupDenoiser, data_of

from popalign_core.alignment.adapters import FullPolicy, copy_weights
from popalign_core.alignment.checkpoint import begin
from popalign_core.alignment.spikes import LEAST, WINDOW, spike_score
from popalign_core.alignment.trainer import train
from popalign_core.errors import LossSpike

# Evenly spaced quantiles: their spread is that of the distribution, without chance.
NORMAL = [NormalDist(0.6, 0.05).inv_cdf((n + 0.5) / WINDOW) for n in range(WINDOW)]


def test_a_score_is_in_standard_deviations() -> None:
    assert spike_score(NORMAL, 0.6 + 4 * 0.05) == pytest.approx(4, rel=0.05)
    assert spike_score(NORMAL, 0.2) == 0, "a loss that falls is none"
    assert spike_score(NORMAL, math.nan) == math.inf


def test_one_outlier_hides_no_other() -> None:
    assert spike_score([*NORMAL[:-1], 1e6], 1.0) > 6


def test_little_is_known_at_the_beginning() -> None:
    assert spike_score([0.6] * (LEAST - 1), 100.0) == 0
    assert spike_score([0.6] * LEAST, 100.0) > 1000
    assert spike_score([0.6] * LEAST, 0.606) == pytest.approx(1), "losses that do not move have a spread of 1%"


@given(st.lists(st.floats(0.1, 10), min_size=LEAST, max_size=WINDOW), st.floats(0.1, 10), st.floats(0.01, 100))
def test_a_score_does_not_depend_on_the_scale(recent: list[float], loss: float, scale: float) -> None:
    scaled = spike_score([scale * value for value in recent], scale * loss)
    assert scaled == pytest.approx(spike_score(recent, loss), rel=1e-6, abs=1e-6)


def test_training_stops_before_the_update_of_a_spike() -> None:
    data, settings = data_of(), replace(SETTINGS, steps=40, spike_limit=30.0, learning_rate=1e-3)
    state = begin(FullPolicy(TwoGroupDenoiser(0.9)), settings)
    steps = train(state.policy, data, settings, state=state)
    list(islice(steps, LEAST + 2))
    sound = copy_weights(state.policy.denoiser)
    # Weights mean nothing to a batch but their size in the loss.
    data.weight.mul_(1e4)
    with pytest.raises(LossSpike, match=rf"at step {LEAST + 3}, .* robust standard deviations .*spike_limit is 30"):
        next(steps)
    assert state.step == LEAST + 2
    assert torch.equal(copy_weights(state.policy.denoiser)["logits"], sound["logits"])
    free = replace(settings, spike_limit=None)
    assert len(list(train(FullPolicy(TwoGroupDenoiser(0.9)), data, free))) == 40
