import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.alignment.objective import (
    DenoisingErrors,
    PairLabels,
    alignment_loss,
    batch_baseline,
    dpo_loss,
    nats_per_unit_error,
    natural_beta,
    popalign_exact_loss,
    popalign_loss,
)
from popalign_core.alignment.safeguard import loser_scale, preserve_winners
from popalign_core.alignment.settings import Objective

PREFERENCE_OBJECTIVES: tuple[Objective, ...] = ("popalign", "popalign_exact", "dpo")
BETA = 3.0
# No deadline: the first backward pass of a process takes seconds on a busy machine.
examples = settings(deadline=None, max_examples=40)
errors_list = st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4)
pair_values = st.lists(errors_list, min_size=1, max_size=8)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def errors_of(rows: list[list[float]]) -> DenoisingErrors:
    """Rows of (policy winner, policy loser, reference winner, reference loser)."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    return DenoisingErrors(columns[0].clone().requires_grad_(), columns[1].clone().requires_grad_(), *columns[2:])


def labels_of(pairs: int, populations: list[int] | None = None, weights: list[float] | None = None) -> PairLabels:
    return PairLabels(double(weights or [1.0] * pairs), torch.tensor(populations or [0] * pairs))


def gradients(loss: Tensor, errors: DenoisingErrors) -> Tensor:
    return torch.stack(torch.autograd.grad(loss, (errors.policy_winner, errors.policy_loser)))


def loss_of(objective: Objective, errors: DenoisingErrors, labels: PairLabels, beta: float = BETA) -> Tensor:
    return alignment_loss(errors, labels, objective=objective, beta=beta)


@pytest.mark.parametrize("objective", PREFERENCE_OBJECTIVES)
@examples
@given(reference=st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=6))
def test_loss_at_the_reference_is_log_two(objective: Objective, reference: list[tuple[float, float]]) -> None:
    errors = errors_of([[winner, loser, winner, loser] for winner, loser in reference])
    populations = [index % 2 for index in range(len(reference))]
    loss = loss_of(objective, errors, labels_of(len(reference), populations))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert errors.implicit_accuracy().item() == 0.5


@pytest.mark.parametrize("objective", PREFERENCE_OBJECTIVES)
def test_slope_at_the_reference_is_minus_half_beta_per_unit_margin(objective: Objective) -> None:
    # One unit of margin: every winner's error falls by 1 and every loser's rises by 1, see the module's table.
    errors = errors_of([[0.3, 0.4, 0.3, 0.4], [0.1, 0.9, 0.1, 0.9], [0.5, 0.2, 0.5, 0.2]])
    gradient = gradients(loss_of(objective, errors, labels_of(3, [0, 0, 1])), errors)
    slope = (gradient[1] - gradient[0]).sum().item()
    assert slope == pytest.approx(-BETA / 2, rel=1e-12)


@examples
@given(values=errors_list, beta=st.floats(0.1, 50))
def test_one_pair_gives_the_gradient_of_dpo(values: list[float], beta: float) -> None:
    errors, labels = errors_of([values]), labels_of(1)
    bound, dpo = popalign_loss(errors, beta, labels.weights), dpo_loss(errors, beta, labels.weights)
    assert bound.item() == pytest.approx(dpo.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(gradients(bound, errors), gradients(dpo, errors), rtol=1e-12, atol=1e-12)


@examples
@given(rows=pair_values)
def test_exact_loss_of_single_pairs_is_dpo(rows: list[list[float]]) -> None:
    errors, labels = errors_of(rows), labels_of(len(rows), list(range(len(rows))))
    exact = popalign_exact_loss(errors, BETA, labels)
    assert exact.item() == pytest.approx(dpo_loss(errors, BETA, labels.weights).item(), rel=1e-12, abs=1e-12)


@examples
@given(
    rows=pair_values,
    beta=st.floats(0.1, 50),
    baseline=st.one_of(st.none(), st.floats(-3, 3)),
    picks=st.lists(st.tuples(st.integers(0, 2), st.floats(0.1, 3)), min_size=8, max_size=8),
)
def test_stochastic_bound_is_never_below_the_exact_loss(
    rows: list[list[float]], beta: float, baseline: float | None, picks: list[tuple[int, float]]
) -> None:
    errors = errors_of(rows)
    populations, weights = (list(column)[: len(rows)] for column in zip(*picks, strict=True))
    labels = labels_of(len(rows), populations, weights)
    fixed = None if baseline is None else double([baseline])[0]
    bound = popalign_loss(errors, beta, labels.weights, fixed).item()
    exact = popalign_exact_loss(errors, beta, labels).item()
    assert bound >= exact - 1e-9 * max(1.0, exact)


def test_bound_is_tight_when_all_margins_agree_and_loose_when_not() -> None:
    same = errors_of([[0.1, 0.7, 0.4, 0.4], [0.2, 0.8, 0.5, 0.5]])
    labels = labels_of(2)
    bound, exact = popalign_loss(same, BETA, labels.weights), popalign_exact_loss(same, BETA, labels)
    assert bound.item() == pytest.approx(exact.item(), rel=1e-12)
    apart = errors_of([[0.1, 0.7, 0.4, 0.4], [0.8, 0.2, 0.5, 0.5]])
    gap = popalign_loss(apart, BETA, labels.weights) - popalign_exact_loss(apart, BETA, labels)
    # Margins are +0.3 and -0.3, their mean 0: (softplus(0.9) + softplus(-0.9)) / 2 - log 2.
    assert gap.item() == pytest.approx((math.log1p(math.exp(0.9)) * 2 - 0.9) / 2 - math.log(2), rel=1e-9)


def test_coarser_populations_never_raise_the_exact_loss() -> None:
    errors = errors_of([[0.1, 0.7, 0.4, 0.4], [0.8, 0.2, 0.5, 0.5], [0.3, 0.3, 0.2, 0.6]])
    losses = [
        popalign_exact_loss(errors, BETA, labels_of(3, groups)).item() for groups in ([0, 1, 2], [5, 5, 9], [3] * 3)
    ]
    assert losses[0] > losses[1] > losses[2] > 0


@pytest.mark.parametrize("objective", ["popalign_exact", "dpo"])
@examples
@given(margin=st.floats(-2, 2))
def test_swapping_the_sides_changes_the_loss_by_the_logit(objective: Objective, margin: float) -> None:
    forward = loss_of(objective, errors_of([[1 - margin, 1, 1, 1]]), labels_of(1)).item()
    backward = loss_of(objective, errors_of([[1, 1 - margin, 1, 1]]), labels_of(1)).item()
    assert forward - backward == pytest.approx(-BETA * margin / 2, rel=1e-9, abs=1e-12)


@examples
@given(margin=st.floats(-2, 2), baseline=st.floats(-1, 1))
def test_relabelling_changes_the_bound_by_the_logit(margin: float, baseline: float) -> None:
    middle, weights = double([baseline])[0], double([1.0])
    forward = popalign_loss(errors_of([[1 - margin, 1 + margin, 1, 1]]), BETA, weights, middle).item()
    backward = popalign_loss(errors_of([[1 + margin, 1 - margin, 1, 1]]), BETA, weights, middle).item()
    assert forward - backward == pytest.approx(-BETA * margin, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objective", PREFERENCE_OBJECTIVES)
@examples
@given(rows=pair_values, drop=st.floats(0.01, 0.5))
def test_loss_falls_as_the_winners_get_better_or_the_losers_worse(
    objective: Objective, rows: list[list[float]], drop: float
) -> None:
    labels = labels_of(len(rows))
    base = loss_of(objective, errors_of(rows), labels).item()
    better = loss_of(objective, errors_of([[row[0] - drop, *row[1:]] for row in rows]), labels).item()
    worse = loss_of(objective, errors_of([[row[0], row[1] + drop, *row[2:]] for row in rows]), labels).item()
    assert better < base
    assert worse < base


@pytest.mark.parametrize("objective", PREFERENCE_OBJECTIVES)
@examples
@given(rows=pair_values, constant=st.floats(-1, 1))
def test_loss_ignores_a_constant_in_model_and_reference_error(
    objective: Objective, rows: list[list[float]], constant: float
) -> None:
    labels = labels_of(len(rows))
    shifted = [[value + constant for value in row] for row in rows]
    assert loss_of(objective, errors_of(shifted), labels).item() == pytest.approx(
        loss_of(objective, errors_of(rows), labels).item(), rel=1e-9
    )


def test_hand_worked_batch() -> None:
    # g of the winners 1 and 0, of the losers -1 and 0; the baseline is 0, beta 1. With e = exp(1):
    # winner 1 and loser 1 cost log(1 + 1/e) each, winner 2 and loser 2 cost log 2 each.
    errors = errors_of([[0.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert batch_baseline(errors).item() == 0
    assert errors.implicit_accuracy().item() == 0.75
    apart, same = math.log(1 + 1 / math.e), math.log(2)
    assert loss_of("popalign", errors, labels_of(2), 1.0).item() == pytest.approx((apart + same) / 2, rel=1e-12)
    assert loss_of("dpo", errors, labels_of(2), 1.0).item() == pytest.approx((apart + same) / 2, rel=1e-12)
    # All four samples in one sigmoid: the mean of (2, 0) / 2 is 1/2.
    half = math.log(1 + 1 / math.sqrt(math.e))
    assert loss_of("popalign_exact", errors, labels_of(2), 1.0).item() == pytest.approx(half, rel=1e-12)
    assert loss_of("sft", errors, labels_of(2), 1.0).item() == 0.5
    weighted = labels_of(2, weights=[1.5, 0.5])
    assert loss_of("popalign", errors, weighted, 1.0).item() == pytest.approx((1.5 * apart + 0.5 * same) / 2, rel=1e-12)
    # Weighted margin (1.5 * 2 + 0.5 * 0) / (2 * 2) = 3/4.
    three_quarters = math.log(1 + math.exp(-0.75))
    assert loss_of("popalign_exact", errors, weighted, 1.0).item() == pytest.approx(three_quarters, rel=1e-12)


def test_anchor_adds_the_winners_error() -> None:
    errors, labels = errors_of([[0.2, 0.4, 0.3, 0.4], [0.6, 0.1, 0.3, 0.4]]), labels_of(2)
    plain = alignment_loss(errors, labels, objective="popalign", beta=BETA)
    anchored = alignment_loss(errors, labels, objective="popalign", beta=BETA, anchor_weight=100.0)
    assert (anchored - plain).item() == pytest.approx(100 * 0.4, rel=1e-12)


def test_baseline_is_detached() -> None:
    errors = errors_of([[0.2, 0.4, 0.3, 0.4], [0.6, 0.1, 0.3, 0.4]])
    given_baseline = popalign_loss(errors, BETA, double([1.0, 1.0]), batch_baseline(errors))
    own_baseline = popalign_loss(errors, BETA, double([1.0, 1.0]))
    torch.testing.assert_close(gradients(own_baseline, errors), gradients(given_baseline, errors), rtol=0, atol=0)


def test_extreme_margins_stay_finite() -> None:
    errors = errors_of([[50.0, 0.0, 0.0, 50.0]])
    for objective in PREFERENCE_OBJECTIVES:
        loss = loss_of(objective, errors, labels_of(1), 5000.0)
        assert loss.item() == pytest.approx(5000 * 50, rel=1e-9)
        assert bool(torch.isfinite(gradients(loss, errors)).all())


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_is_not_positive_is_refused(beta: float) -> None:
    for objective in PREFERENCE_OBJECTIVES:
        with pytest.raises(ValueError, match="above 0"):
            loss_of(objective, errors_of([[1.0, 1.0, 1.0, 1.0]]), labels_of(1), beta)


def test_processes_with_shares_of_unequal_size_add_up_to_the_whole_step() -> None:
    rows = [[0.2, 0.4, 0.3, 0.4], [0.6, 0.1, 0.3, 0.4], [0.5, 0.8, 0.4, 0.9]]
    for objective in PREFERENCE_OBJECTIVES:
        errors = errors_of(rows)
        baseline = batch_baseline(errors)
        whole = gradients(
            alignment_loss(errors, labels_of(3, [0, 1, 1]), objective=objective, beta=BETA, baseline=baseline),
            errors,
        )
        parts: list[Tensor] = []
        for share in ([0], [1, 2]):
            part = errors_of([rows[index] for index in share])
            loss = alignment_loss(
                part,
                labels_of(len(share)),
                objective=objective,
                beta=BETA,
                baseline=baseline,
            )
            parts.append(gradients(loss * (len(share) * 2 / 3), part) / 2)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-15)


def test_natural_beta_of_each_objective() -> None:
    assert natural_beta(500, 1000.0, "popalign") == 0.5
    assert natural_beta(500, 1000.0, "dpo") == 0.25
    assert natural_beta(500, 1000.0, "popalign_exact", population_size=10) == 0.025
    assert natural_beta(500, 1000.0, "sft") is None


def test_a_unit_of_error_is_worth_its_nats() -> None:
    """The claim of `nats_per_unit_error` on a density whose likelihood is known.

    Two mixtures of N(-2, 0.3^2) and N(2, 0.3^2) with shares (.8, .2) and (.3, .7). Steps of equal log-SNR make the
    weights of the bound equal, and optimal denoisers close both bounds up to the step size (first order: 0.6%, and the
    cut-off at both ends), so nats * E[g] must be the log-likelihood ratio itself.
    """
    log_snr = torch.linspace(11, -9, 1601, dtype=torch.float64)
    schedule = NoiseSchedule(torch.sigmoid(log_snr))
    nodes, node_weights = (torch.tensor(values) for values in _gauss_hermite(60))
    for clean in (-2.0, -1.7, 2.2):
        signal = schedule.alphas_cumprod[1:, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * nodes
        policy, reference = (_optimal_noise(noisy, signal, share) for share in (0.7, 0.2))
        g = (((reference - nodes) ** 2 - (policy - nodes) ** 2) * node_weights).sum(dim=1).mean().item()
        truth = _log_density(clean, 0.7) - _log_density(clean, 0.2)
        assert nats_per_unit_error(schedule, 1) * g == pytest.approx(truth, rel=0.02)


def test_timesteps_that_are_not_trained_on_are_worth_nothing() -> None:
    schedule = NoiseSchedule(torch.sigmoid(torch.linspace(6, -6, 100, dtype=torch.float64)))
    weights = schedule.error_weights().tolist()
    assert nats_per_unit_error(schedule, 3) == nats_per_unit_error(schedule, 3, 1) == pytest.approx(3 * sum(weights))
    # Timestep 98 and 99: the last two of the weights, which begin with timestep 1.
    assert nats_per_unit_error(schedule, 3, 98) == pytest.approx(3 * sum(weights[-2:]))


def _gauss_hermite(count: int) -> tuple[list[float], list[float]]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return nodes.tolist(), (weights / weights.sum()).tolist()


def _optimal_noise(noisy: Tensor, signal: Tensor, share: float) -> Tensor:
    variance = signal * 0.09 + 1 - signal
    logit = math.log(share / (1 - share)) + 4 * signal.sqrt() * noisy / variance
    mean = 2 * torch.tanh(logit / 2)
    expected = mean + signal.sqrt() * 0.09 / variance * (noisy - signal.sqrt() * mean)
    return (noisy - signal.sqrt() * expected) / (1 - signal).sqrt()


def _log_density(value: float, share: float) -> float:
    parts = [weight * math.exp(-((value - mean) ** 2) / 0.18) for weight, mean in ((1 - share, -2), (share, 2))]
    return math.log(sum(parts))


@examples
@given(
    winner=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    loser=st.lists(st.floats(-1, 1), min_size=3, max_size=3),
    pull=st.floats(0.01, 2),
    push=st.floats(0, 2),
)
def test_scaled_push_never_raises_the_winners_error(
    winner: list[float], loser: list[float], pull: float, push: float
) -> None:
    residuals = double(winner)[None], double(loser)[None]
    scale = loser_scale(*residuals, double([pull]), double([push])).item()
    # Where prediction = parameter, the output-space gradients are the true ones.
    change = pull * residuals[0].square().sum() - scale * push * (residuals[0] * residuals[1]).sum()
    assert 0 <= scale <= 1
    assert change.item() >= -1e-12
    if scale < 1:
        assert change.item() == pytest.approx(0, abs=1e-12)


def test_surrogate_has_the_gradient_of_the_loss_where_nothing_is_harmed() -> None:
    errors = errors_of([[0.2, 0.4, 0.3, 0.4], [0.6, 0.1, 0.3, 0.4]])
    loss = popalign_loss(errors, BETA, double([1.0, 1.0]))
    expected = gradients(popalign_loss(errors, BETA, double([1.0, 1.0])), errors)
    orthogonal = torch.eye(2, dtype=torch.float64)
    surrogate, scale = preserve_winners(loss, errors, orthogonal, orthogonal.flip(0))
    torch.testing.assert_close(gradients(surrogate, errors), expected)
    assert scale.item() == 1
    surrogate, scale = preserve_winners(loss, errors, orthogonal, 1e6 * orthogonal)
    assert 0 < scale.item() < 1e-5
    scaled = gradients(surrogate, errors)
    torch.testing.assert_close(scaled[0], expected[0])
    assert float(scaled[1].abs().max()) < 1e-5
