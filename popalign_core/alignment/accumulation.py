"""The gradient of one step, of a batch that passes through the model at once or in several micro-batches.

The popalign losses are no sum over pairs: each sample is weighed by sigmoid(-s beta (g - k)), and the baseline k is the
mean over all pairs of the step, the exact objective even has one sigmoid a population. A micro-batch cannot know these
weights, and they are no factor that could be mended afterwards. But the loss is a function of the 2 N errors alone, so

    dL/dtheta = sum over pairs i of  dL/de_i * de_i/dtheta

First all errors are measured without a graph, micro-batch by micro-batch; L and dL/de of all N pairs follow (k detached
in it, as ever); then each micro-batch passes once more, with a graph, and sends dL/de_i back. Loss and gradient are
those of one batch, up to rounding. The price is one more forward pass of the policy; the reference's is kept. "dpo" and
"sft" are sums over pairs and need no first pass. After GradCache (Gao et al. 2021, arXiv 2101.06983).

Every pass of a sharded model is one of all processes. One that has fewer micro-batches than another, because its share
of the step is smaller, makes idle passes until they are even: of one of its pairs, weighed 0.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from popalign_core.alignment.adapters import Policy, measured_mode
from popalign_core.alignment.cache import PairBatch, split_batch
from popalign_core.alignment.objective import DenoisingErrors, alignment_loss, batch_baseline
from popalign_core.alignment.passes import Autocast, Residuals, measure_errors, measure_policy, reference_residuals
from popalign_core.alignment.processes import Processes
from popalign_core.alignment.safeguard import preserve_winners
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.sharding import is_sharded

SUMS_OVER_PAIRS = ("dpo", "sft")


@dataclass(frozen=True, eq=False)
class Measured:
    """This process's part of a step, detached. loss: (), the mean over its pairs."""

    loss: Tensor
    errors: DenoisingErrors


def accumulate_gradient(
    policy: Policy, batch: PairBatch, settings: AlignmentSettings, processes: Processes, autocast: Autocast
) -> Measured:
    """Adds the step's gradient to the parameters', scaled so that the mean over processes is the mean over pairs."""
    parts, idle = split_batch(batch, settings.micro_batch), _idle_parts(policy, batch, settings)
    if len(parts) + len(idle) > 1 and settings.objective not in SUMS_OVER_PAIRS:
        return _in_two_passes(policy, batch, (parts, idle), settings, processes, autocast)
    losses: list[Tensor] = []
    found: list[DenoisingErrors] = []
    for part in parts:
        errors, residuals = measure_errors(policy, part, autocast)
        loss, surrogate = _weigh(errors, residuals, part, settings, processes)
        surrogate.backward()  # pyright: ignore[reportUnknownMemberType]
        losses.append(loss.detach() * (len(errors.policy_winner) / len(batch.winner_latents)))
        found.append(errors.detach())
    for part in idle:
        _send_nothing(measure_errors(policy, part, autocast)[0])
    return Measured(torch.stack(losses).sum(), DenoisingErrors.concatenated(found))


def _idle_parts(policy: Policy, batch: PairBatch, settings: AlignmentSettings) -> list[PairBatch]:
    """What is passed only because another process has more pairs and passes; none where that is no matter."""
    if settings.micro_batch is None or not is_sharded(policy.denoiser.parameters()):
        return []
    own, most = (ceil(pairs / settings.micro_batch) for pairs in (len(batch.winner_latents), batch.most_pairs))
    return [batch.part(slice(0, 1))] * (most - own)


def _send_nothing(errors: DenoisingErrors) -> None:
    """A backward pass that adds 0 to every gradient."""
    (torch.cat(errors.of_policy()).sum() * 0).backward()  # pyright: ignore[reportUnknownMemberType]


def _in_two_passes(
    policy: Policy,
    batch: PairBatch,
    parts_and_idle: tuple[list[PairBatch], list[PairBatch]],
    settings: AlignmentSettings,
    processes: Processes,
    autocast: Autocast,
) -> Measured:
    parts, idle = parts_and_idle
    passed = parts + idle
    references = [reference_residuals(policy, part, autocast) for part in passed]
    first: list[tuple[DenoisingErrors, Residuals]] = []
    for part, known in zip(passed, references, strict=True):
        with measured_mode(policy):
            found, residual = measure_policy(policy, part, known, autocast)
        first.append((found.detach(), residual))  # at once: a graph keeps the activations of its pass
    first = first[: len(parts)]
    errors = DenoisingErrors.concatenated([found for found, _ in first]).as_variables()
    residuals = Residuals(*(torch.cat([getattr(found, side) for _, found in first]) for side in ("winner", "loser")))
    loss, surrogate = _weigh(errors, residuals, batch, settings, processes)
    slopes = torch.autograd.grad(surrogate, errors.of_policy(), allow_unused=True, materialize_grads=True)
    start = 0
    for part, known in zip(parts, references, strict=False):
        stop = start + len(part.winner_latents)
        again, _ = measure_policy(policy, part, known, autocast)
        terms = [(slope[start:stop] * error).sum() for slope, error in zip(slopes, again.of_policy(), strict=True)]
        torch.stack(terms).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        start = stop
    for part, known in zip(idle, references[len(parts) :], strict=True):
        _send_nothing(measure_policy(policy, part, known, autocast)[0])
    return Measured(loss.detach(), errors.detach())


def _weigh(
    errors: DenoisingErrors, residuals: Residuals, batch: PairBatch, settings: AlignmentSettings, processes: Processes
) -> tuple[Tensor, Tensor]:
    """The loss of these pairs, and what to differentiate so that gradients average over processes."""
    pairs = len(errors.policy_winner)
    baseline = None
    if settings.objective == "popalign":
        baseline = processes.mean_over_pairs(batch_baseline(errors), pairs, batch.global_pairs)
    loss = alignment_loss(
        errors,
        batch.labels,
        objective=settings.objective,
        beta=settings.beta,
        anchor_weight=settings.anchor_weight,
        baseline=baseline,
    )
    surrogate = loss
    if settings.winner_preserving:
        surrogate, _ = preserve_winners(loss, errors, residuals.winner, residuals.loser)
    if errors.named_drift is not None:
        preserved = settings.preserve_weight * errors.named_drift.mean()
        loss, surrogate = loss + preserved, surrogate + preserved
    # Shares may differ in size; the mean over processes must still be the mean over pairs.
    return loss, surrogate * (pairs * processes.share.processes / batch.global_pairs)
