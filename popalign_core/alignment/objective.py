"""Preference objectives on denoising errors: PopAlign (bound and exact), Diffusion-DPO, and SFT.

Notation, per sample x of a pair, all at one noise and one timestep shared by the winner and the loser:
    g(x) = mse_reference(x) - mse_policy(x)     how much better the policy denoises x than the reference ("log-ratio")
with the mean squared error taken over the latent elements, as the paper's code does. Every objective is a log-loss of
beta times a *margin* that is 0 at the reference, so that each equals log 2 there and has the slope -beta / 2 per unit
of margin: one beta means the same strength in all of them.

    popalign        winner g(x) - kl, loser kl - g(x)          one term a sample
    popalign_exact  mean over a population of (g_w - g_l) / 2   one term a population
    dpo             (g_w - g_l) / 2                            one term a pair
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from popalign_core.alignment.denoiser import Schedule
from popalign_core.alignment.settings import Objective
from popalign_core.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class DenoisingErrors:
    """Mean squared denoising errors of a batch of pairs, each of shape (pairs,); the reference's carry no gradient.

    named_drift: (pairs,), mean squared distance between the predictions of policy and reference for one image of each
    pair under the caption that names its groups; None where it was not asked for.
    """

    policy_winner: Tensor
    policy_loser: Tensor
    reference_winner: Tensor
    reference_loser: Tensor
    named_drift: Tensor | None = None

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """The g of the winners and that of the losers, each (pairs,), in units of mean squared error."""
        return self.reference_winner - self.policy_winner, self.reference_loser - self.policy_loser

    def of_policy(self) -> list[Tensor]:
        """Those that depend on the policy: winners', losers', and the named drift where there is one."""
        return [self.policy_winner, self.policy_loser, *([] if self.named_drift is None else [self.named_drift])]

    def detach(self) -> "DenoisingErrors":
        """The same values without a graph."""
        return DenoisingErrors(*(None if each is None else each.detach() for each in self._all()))  # pyright: ignore

    def as_variables(self) -> "DenoisingErrors":
        """The same values as the leaves of a graph of their own."""
        found = self.detach()
        for each in found.of_policy():
            each.requires_grad_()
        return found

    @classmethod
    def concatenated(cls, parts: Sequence["DenoisingErrors"]) -> "DenoisingErrors":
        """Those of several batches, in their order."""
        columns = zip(*(part._all() for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # pyright: ignore

    def _all(self) -> tuple[Tensor | None, ...]:
        return (
            self.policy_winner,
            self.policy_loser,
            self.reference_winner,
            self.reference_loser,
            self.named_drift,
        )

    def implicit_accuracy(self) -> Tensor:
        """Share of pairs whose winner gained more than its loser, a scalar; a tie counts one half."""
        winner, loser = self.log_ratios()
        return (0.5 + 0.5 * torch.sign((winner - loser).detach())).mean()


@dataclass(frozen=True, eq=False)
class PairLabels:
    """weights: (pairs,), positive, mean 1 over the data; populations: (pairs,) int64, the population of each pair."""

    weights: Tensor
    populations: Tensor


def number_populations(populations: Tensor) -> tuple[Tensor, Tensor]:
    """Populations numbered from 0 in sorted order: each pair's number, (pairs,), and the sizes, (populations,)."""
    found = cast(
        "tuple[Tensor, Tensor, Tensor]",
        torch.unique(populations, return_inverse=True, return_counts=True),  # pyright: ignore[reportUnknownMemberType]
    )
    return found[1], found[2]


def batch_baseline(errors: DenoisingErrors) -> Tensor:
    """The paper's `kl`: half the mean g of the winners plus half that of the losers, detached, a scalar.

    It is not clamped at 0, as in the default branch of the paper's code.
    """
    winner, loser = errors.log_ratios()
    return (winner.mean() + loser.mean()).detach() / 2


def popalign_loss(errors: DenoisingErrors, beta: float, weights: Tensor, baseline: Tensor | None = None) -> Tensor:
    """The stochastic bound of PopAlign as in its code: mean over samples of -w log sigmoid(s beta (g - kl)).

    s is +1 for winners and -1 for losers. baseline: (), over all processes; None computes it from these pairs.
    With one pair in the batch its gradient is that of `dpo_loss`, because kl is then the middle of the two g.

    It is never below `popalign_exact_loss` of the same errors, weights and beta, whatever the baseline and however
    the pairs are divided into populations. Proof: a population's exact margin is the weighted mean over its 2 n
    samples of s (g - c) for *any* constant c, because s sums to zero over pairs of equal weight; -log sigmoid is
    convex, so its value at that mean is at most the mean of its values (Jensen). Equality only if all margins agree.
    Source: PopAlign (Li, Singh & Grover, arXiv 2406.19668), code snapshot 500358a, main.py, `bce_offset="sigmoid"`.
    Raises: ValueError if beta <= 0.
    """
    _require_positive(beta)
    winner, loser = errors.log_ratios()
    middle = batch_baseline(errors) if baseline is None else baseline
    losses = -logsigmoid(beta * (winner - middle)) - logsigmoid(beta * (middle - loser))
    return (weights * losses).mean() / 2


def popalign_exact_loss(errors: DenoisingErrors, beta: float, labels: PairLabels) -> Tensor:
    """The population-level objective: all samples of both populations inside one log-sigmoid.

    Per population -log sigmoid(beta * weighted mean of (g_w - g_l) / 2), averaged with the populations' weights.
    The paper writes the *sum* over a population of n pairs; sum and mean differ by the constant 2 n in beta, and the
    mean keeps one beta usable at any population size (its bound then has the same beta, see `popalign_loss`).
    Raises: ValueError if beta <= 0.
    """
    _require_positive(beta)
    winner, loser = errors.log_ratios()
    position, _ = number_populations(labels.populations)
    # A matrix product, not index_add: the latter adds in no fixed order on a GPU.
    weighted_members = one_hot(position).to(winner.dtype).T * labels.weights.to(winner.dtype)
    population_weights = weighted_members.sum(dim=1)
    margins = (weighted_members @ (winner - loser)) / (2 * population_weights)
    return (population_weights * -logsigmoid(beta * margins)).sum() / len(winner)


def dpo_loss(errors: DenoisingErrors, beta: float, weights: Tensor) -> Tensor:
    """Diffusion-DPO: mean over pairs of -w log sigmoid(beta / 2 (g_w - g_l)).

    Source: Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization", eq. 14 (the factor
    T omega in beta) and its released code (the factor one half). Raises: ValueError if beta <= 0.
    """
    _require_positive(beta)
    winner, loser = errors.log_ratios()
    return (weights * -logsigmoid(beta * (winner - loser) / 2)).mean()


def sft_loss(errors: DenoisingErrors, weights: Tensor) -> Tensor:
    """Supervised fine-tuning on the preferred side: weighted mean denoising error of the winners."""
    return (weights * errors.policy_winner).mean()


def alignment_loss(
    errors: DenoisingErrors,
    labels: PairLabels,
    *,
    objective: Objective,
    beta: float,
    anchor_weight: float = 0.0,
    baseline: Tensor | None = None,
) -> Tensor:
    """The objective of that name, plus anchor_weight times the winners' error, a scalar.

    The anchor keeps the preference term from buying its margin with a worse winner.
    """
    match objective:
        case "popalign":
            loss = popalign_loss(errors, beta, labels.weights, baseline)
        case "popalign_exact":
            loss = popalign_exact_loss(errors, beta, labels)
        case "dpo":
            loss = dpo_loss(errors, beta, labels.weights)
        case "sft":
            loss = sft_loss(errors, labels.weights)
        case "reward":
            raise InvalidInput('the objective "reward" has no pairs: train with `policy_gradient.train_on_reward`.')
    return loss + anchor_weight * sft_loss(errors, labels.weights) if anchor_weight else loss


def nats_per_unit_error(schedule: Schedule, latent_elements: int, first_timestep: int = 0) -> float:
    """Nats of log-likelihood that one unit of g stands for, if g is averaged over uniform timesteps from the first on.

    The variational bound is log p(x) >= const - sum over timesteps t and elements j of w_t E[error_tj^2], where w_t is
    `Schedule.error_weights`. g averages over elements and, in expectation, over timesteps, both uniformly. If all
    w_t were equal to w, then log p_policy(x) - log p_reference(x) = latent_elements * timesteps * w * E[g], up to the
    difference of the two bounds' gaps. Real schedules have unequal w_t; this takes the uniform weights with the same
    sum, so it is an order of magnitude and not an identity. Timesteps before the first are no part of g, nor of this.
    """
    # The weights begin with timestep 1.
    return latent_elements * schedule.error_weights()[max(0, first_timestep - 1) :].sum().item()


def natural_beta(beta: float, nats: float, objective: Objective, population_size: float = 1) -> float | None:
    """Beta in units of log-likelihood: the b for which the loss reads log sigmoid(b * (difference of log-ratios)).

    nats: `nats_per_unit_error`. population_size: mean pairs in a population, used by "popalign_exact" alone.
    The optimum of such a loss is reference * (p_winner / p_loser)^(1 / b). With losers drawn from the reference, b = 1
    ends at the winners' distribution; the usual betas have b far below 1, so their optimum lies far beyond it and
    training must be stopped. "popalign" compares a sample with the baseline, b = beta / nats; "dpo" halves the
    difference of the two samples of a pair, b = beta / (2 nats); "popalign_exact" spreads that over a population of n
    pairs, b = beta / (2 n nats). None for "sft" and "reward", which have no beta.
    """
    match objective:
        case "popalign":
            return beta / nats
        case "dpo":
            return beta / (2 * nats)
        case "popalign_exact":
            return beta / (2 * population_size * nats)
        case "sft" | "reward":
            return None


def _require_positive(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta is {beta}, expected a number above 0")
