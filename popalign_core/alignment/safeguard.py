"""Winner-preserving updates: no push away from a loser that would drag its winner along."""

import torch
from torch import Tensor

from popalign_core.alignment.objective import DenoisingErrors


def loser_scale(winner_residual: Tensor, loser_residual: Tensor, winner_pull: Tensor, loser_push: Tensor) -> Tensor:
    """Factors in [0, 1] for the losers' gradients that keep each winner's error from rising to first order, (pairs,).

    winner_residual, loser_residual: prediction minus target, (pairs, elements).
    winner_pull: derivative of the loss by the winner's error; loser_push: minus that by the loser's; (pairs,), >= 0.

    A step against the gradient changes the winner's error by a negative multiple of
    pull |grad_w|^2 - scale push <grad_w, grad_l>; it must not be negative, so
    scale = min(1, pull |grad_w|^2 / (push <grad_w, grad_l>)) where the inner product is positive, else 1.
    Gradients are taken in output space, where they are the residuals: no second backward pass, and exact only as far
    as the network's Jacobian is the same for winner and loser (same caption, noise and timestep).
    Source: Diffusion-SDPO (Fu et al. 2025, arXiv 2511.03317); pull and push are 1 there, since DPO weighs both alike.
    """
    gain = winner_pull * winner_residual.square().sum(dim=1)
    loss = loser_push * (winner_residual * loser_residual).sum(dim=1)
    harmful = loss > gain
    return torch.where(harmful, gain / torch.where(harmful, loss, 1.0), 1.0)


def preserve_winners(
    loss: Tensor, errors: DenoisingErrors, winner_residual: Tensor, loser_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """A surrogate with the loss's gradient, the losers' part scaled; and the mean scale, both scalars.

    Works for any objective, because the derivatives by the errors are taken from the loss itself. The surrogate's
    value means nothing: report the loss.
    """
    pull, minus_push = torch.autograd.grad(
        loss, (errors.policy_winner, errors.policy_loser), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    with torch.no_grad():
        scale = loser_scale(winner_residual.flatten(1), loser_residual.flatten(1), pull, -minus_push)
    surrogate = (pull * errors.policy_winner).sum() + (scale * minus_push * errors.policy_loser).sum()
    return surrogate, scale.mean()
