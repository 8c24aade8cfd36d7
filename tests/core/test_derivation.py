"""The derivation in docs/method.md, sections 2 and 3, on a model whose every expectation can be computed.

Policy and reference are the optimal denoisers of N(mean, SPREAD^2) in one dimension, the mean their only parameter.
The squared error of a noisy image is then quadratic in the noise: three Gauss-Hermite nodes give exact expectations.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.alignment.objective import (
    DenoisingErrors,
    PairLabels,
    nats_per_unit_error,
    popalign_exact_loss,
    popalign_loss,
)

SPREAD = 0.5
BETA = 8.0
REFERENCE_MEAN = 0.0
# Two pairs of one population: winners lie higher than losers, as a policy with a positive mean wants them.
WINNERS, LOSERS = torch.tensor([0.9, 0.2], dtype=torch.float64), torch.tensor([-0.6, 0.1], dtype=torch.float64)
LABELS = PairLabels(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
COARSE = NoiseSchedule(torch.sigmoid(torch.linspace(5, -5, 6, dtype=torch.float64)))


def nodes() -> tuple[Tensor, Tensor]:
    """Of a standard normal: places and weights that integrate polynomials up to degree 5 exactly."""
    places, weights = np.polynomial.hermite_e.hermegauss(3)
    return torch.from_numpy(places), torch.from_numpy(weights / weights.sum())


def draws(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """All (timestep, noise) with their probabilities, each (draws,)."""
    places, weights = nodes()
    count = len(schedule)
    timesteps = torch.arange(count).repeat_interleave(len(places))
    return timesteps, places.repeat(count), weights.repeat(count) / count


def squared_error(mean: Tensor, clean: Tensor, timesteps: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Of the optimal denoiser of N(mean, SPREAD^2); the arguments broadcast."""
    signal = schedule.alphas_cumprod[timesteps]
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    variance = signal * SPREAD**2 + 1 - signal
    expected = mean + signal.sqrt() * SPREAD**2 / variance * (noisy - signal.sqrt() * mean)
    return ((noisy - signal.sqrt() * expected) / (1 - signal).sqrt() - noise) ** 2


def errors_at(mean: Tensor, timesteps: Tensor, noise: Tensor) -> DenoisingErrors:
    """One draw a pair, each (pairs,), shared by its winner and its loser and by policy and reference."""
    reference = torch.tensor(REFERENCE_MEAN, dtype=torch.float64)
    parts = [
        squared_error(center, clean, timesteps, noise, COARSE)
        for center in (mean, reference)
        for clean in (WINNERS, LOSERS)
    ]
    return DenoisingErrors(*parts)


def expected_errors(mean: Tensor) -> DenoisingErrors:
    """Averaged over all draws."""
    timesteps, noise, chances = draws(COARSE)
    every = [errors_at(mean, t.expand(2), e.expand(2)) for t, e in zip(timesteps, noise, strict=True)]
    names = ("policy_winner", "policy_loser", "reference_winner", "reference_loser")
    return DenoisingErrors(
        *(sum(c * getattr(one, name) for c, one in zip(chances, every, strict=True)) for name in names)  # pyright: ignore
    )


def joint_draws() -> list[tuple[Tensor, Tensor, float]]:
    """Every combination of independent draws of the two pairs, with its probability."""
    timesteps, noise, chances = draws(COARSE)
    return [
        (timesteps[[i, j]], noise[[i, j]], float(chances[i] * chances[j]))
        for i, j in product(range(len(chances)), repeat=2)
    ]


def mean_of(value: str, mean: Tensor, baseline: Tensor | None = None) -> Tensor:
    """Expectation over all joint draws of the exact loss or of the bound."""
    total = torch.zeros((), dtype=torch.float64)
    for timesteps, noise, chance in joint_draws():
        errors = errors_at(mean, timesteps, noise)
        exact = value == "exact"
        loss = popalign_exact_loss(errors, BETA, LABELS)
        total = total + chance * (loss if exact else popalign_loss(errors, BETA, LABELS.weights, baseline))
    return total


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("mean", [-0.4, 0.15, 0.5])
def test_the_population_objective_its_bounds_and_no_other_order(mean: float) -> None:
    """(7) at expected errors <= (5a), timesteps drawn outside <= (8), images drawn outside, for any baseline."""
    policy = scalar(mean)
    population = popalign_exact_loss(expected_errors(policy), BETA, LABELS)
    one_timestep = mean_of("exact", policy)
    assert population < one_timestep - 1e-4
    for baseline in (scalar(0.0), scalar(0.05), scalar(-0.2), None):
        assert one_timestep < mean_of("bound", policy, baseline) - 1e-4


def test_all_of_them_are_log_two_at_the_reference() -> None:
    policy = scalar(REFERENCE_MEAN)
    values = [popalign_exact_loss(expected_errors(policy), BETA, LABELS), mean_of("exact", policy)]
    for value in (*values, mean_of("bound", policy)):
        assert value.item() == pytest.approx(math.log(2), rel=1e-12)


def single_pair(errors: DenoisingErrors, pair: int) -> DenoisingErrors:
    names = ("policy_winner", "policy_loser", "reference_winner", "reference_loser")
    return DenoisingErrors(*(getattr(errors, name)[pair : pair + 1] for name in names))


def test_at_the_reference_single_pairs_give_the_gradient_of_the_population() -> None:
    """What the stochastic version relies on: there all weights of (9a) are one half, whatever is drawn."""
    gradients: list[float] = []
    policy = scalar(REFERENCE_MEAN).requires_grad_()
    singles = torch.zeros((), dtype=torch.float64)
    for timesteps, noise, chance in joint_draws():
        errors = errors_at(policy, timesteps, noise)
        for pair in range(2):
            singles = singles + chance / 2 * popalign_loss(single_pair(errors, pair), BETA, torch.ones(1))
    whole = popalign_exact_loss(expected_errors(policy), BETA, LABELS)
    for value in (whole, mean_of("exact", policy), mean_of("bound", policy), singles):
        gradients.append(torch.autograd.grad(value, policy)[0].item())
    assert gradients[0] < -0.1
    assert gradients[1:] == pytest.approx([gradients[0]] * 3, rel=1e-10)


def test_single_pairs_estimate_the_bound_without_bias_where_the_baseline_is_given_and_not_with_their_own() -> None:
    policy, baseline = scalar(0.5), scalar(0.05)
    means = {"given": 0.0, "own": 0.0}
    for timesteps, noise, chance in joint_draws():
        errors = errors_at(policy, timesteps, noise)
        for pair in range(2):
            one, weight = single_pair(errors, pair), torch.ones(1, dtype=torch.float64)
            means["given"] += chance / 2 * popalign_loss(one, BETA, weight, baseline).item()
            means["own"] += chance / 2 * popalign_loss(one, BETA, weight).item()
    bound = mean_of("bound", policy, baseline).item()
    assert means["given"] == pytest.approx(bound, rel=1e-12)
    assert abs(means["own"] - mean_of("bound", policy).item()) > 1e-3


def test_the_weights_of_the_gradient_are_those_that_the_document_gives() -> None:
    """(9a), with the baseline held fixed."""
    policy = scalar(0.5).requires_grad_()
    errors = errors_at(policy, torch.tensor([1, 4]), scalar(0.3).expand(2))
    winner, loser = errors.log_ratios()
    baseline = ((winner.mean() + loser.mean()) / 2).detach()
    loss = popalign_loss(errors, BETA, LABELS.weights)
    found = torch.autograd.grad(loss, policy, retain_graph=True)[0]
    expected = scalar(0.0)
    for sign, gains in ((1, winner), (-1, loser)):
        for gain in gains:
            slope = torch.autograd.grad(gain, policy, retain_graph=True)[0]
            expected += -BETA * sign * torch.sigmoid(-BETA * sign * (gain.detach() - baseline)) * slope / 4
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_drawing_at_random_estimates_the_bound() -> None:
    policy, baseline = scalar(0.5), scalar(0.05)
    timesteps, noise, chances = draws(COARSE)
    picks = torch.multinomial(chances.expand(4000, -1), 2, replacement=True, generator=torch.Generator().manual_seed(0))
    values = [
        popalign_loss(errors_at(policy, timesteps[pick], noise[pick]), BETA, LABELS.weights, baseline) for pick in picks
    ]
    estimates = torch.stack(values)
    error = float(estimates.std()) / math.sqrt(len(values))
    # Four standard errors: false alarm 6e-5. They are small enough to tell the bound from what it bounds.
    assert estimates.mean().item() == pytest.approx(mean_of("bound", policy, baseline).item(), abs=4 * error)
    assert 4 * error < float(mean_of("bound", policy, baseline) - mean_of("exact", policy))


@pytest.mark.parametrize("clean", [-0.7, 0.3, 1.2])
def test_the_gain_in_error_is_the_log_ratio_and_its_gradient_the_score(clean: float) -> None:
    """(4) and (5) with steps of equal log-SNR: nats E[g] = log p - log p_0, and d/dmean of it is (x - mean) / SPREAD^2.

    The step size leaves 1.3% (first order in it), both ends of the schedule less.
    """
    schedule = NoiseSchedule(torch.sigmoid(torch.linspace(11, -9, 801, dtype=torch.float64)))
    timesteps, noise, chances = draws(schedule)
    # The bound's weights begin with timestep 1.
    used = timesteps > 0
    chances = chances[used] / chances[used].sum()
    policy, image = scalar(0.4).requires_grad_(), scalar(clean)
    reference, own = (
        squared_error(center, image, timesteps[used], noise[used], schedule)
        for center in (scalar(REFERENCE_MEAN), policy)
    )
    gain = nats_per_unit_error(schedule, 1) * (chances * (reference - own)).sum()
    truth = ((image - REFERENCE_MEAN) ** 2 - (image - policy) ** 2) / (2 * SPREAD**2)
    assert gain.item() == pytest.approx(truth.item(), rel=0.02)
    score = (image - policy.detach()) / SPREAD**2
    assert torch.autograd.grad(gain, policy)[0].item() == pytest.approx(score.item(), rel=0.02)
