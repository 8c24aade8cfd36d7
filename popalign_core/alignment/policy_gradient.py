"""A baseline by reinforcement learning: a group-relative policy gradient on the denoising chain.

DDPO (Black et al. 2023, arXiv 2305.13301): denoising is a sequence of Gaussian decisions, the reward comes with the
image, and the gradient of its expectation is E[reward * sum over steps of grad log p(x_s | x_t)], there DDPO-SF. They
are relative to the other images of the prompt (GRPO; for diffusion Flow-GRPO, arXiv 2505.05470, and DanceGRPO, arXiv
2505.07818), and of each image some steps only are differentiated, as in the latter. Every update draws its own images,
so that ratios of importance are 1 and there is nothing to clip.

The advantages of a group are known before its gradient is computed, and that is a sum over images and steps: micro-
batches add up to it, whatever their size.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.cache import rotate
from popalign_core.alignment.chain import Conditions, DenoisingChain, step_log_density
from popalign_core.alignment.checkpoint import TrainingState, begin, load_state
from popalign_core.alignment.denoiser import NoiseSchedule
from popalign_core.alignment.processes import Processes
from popalign_core.alignment.reward import Cell, ParityTarget, RewardSettings, parity_rewards
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord, autocast_of, clip_gradient, update_weights
from popalign_core.errors import InvalidInput, TrainingDiverged
from popalign_core.seeds import derive_seed

Label = Callable[[Tensor], Sequence[Cell]]


@dataclass(frozen=True, eq=False)
class RewardData:
    """Neutral captions, their targets, and who says what an image shows.

    prompts: an id of each, from which the seeds of its images are derived. captions: of all of them. targets: the axes,
    in the order of the cells. label: latents (b, c, h, w), as the denoiser has them, to the cell of each. shape: of a
    latent, (c, h, w).
    """

    prompts: tuple[str, ...]
    captions: Conditions
    targets: tuple[ParityTarget, ...]
    label: Label
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Group:
    """Images of one prompt: their states (steps + 1, images, c, h, w), advantages and rewards, (images,), and cells."""

    conditions: Conditions
    states: Tensor
    advantages: Tensor
    rewards: Tensor
    cells: Sequence[Cell]


def train_on_reward(
    policy: Policy,
    data: RewardData,
    settings: AlignmentSettings,
    *,
    state: TrainingState | None = None,
    resume_from: Path | None = None,
) -> Iterator[StepRecord]:
    """Train the policy in place, up to `settings.steps` updates; yields one record after each.

    state, resume_from: as in `trainer.train`. An update depends on the weights, the data, the settings and its number
    alone, so that a resumed training goes on as an undisturbed one.
    Raises: InvalidInput without `settings.reward`; TrainingDiverged before an update that is not finite.
    """
    reward = settings.reward
    if settings.objective != "reward" or reward is None:
        raise InvalidInput('a policy gradient needs the objective "reward" and its settings.')
    schedule = policy.denoiser.schedule
    if not isinstance(schedule, NoiseSchedule):
        raise InvalidInput("a policy gradient draws by DDIM, which a model of flow matching does not know.")
    if state is None:
        state = begin(policy, settings) if resume_from is None else load_state(policy, settings, resume_from)
    chain = DenoisingChain(schedule, reward.chain_steps, reward.guidance_scale)
    while state.step < settings.steps:
        yield _advance(state, data, chain, reward)


def _advance(state: TrainingState, data: RewardData, chain: DenoisingChain, reward: RewardSettings) -> StepRecord:
    started = time.perf_counter()
    chosen = rotate(len(data.prompts), reward.groups, state.settings.seed, state.step)
    groups = [draw_group(state, data, chain, int(prompt), place) for place, prompt in enumerate(chosen)]
    state.optimizer.zero_grad(set_to_none=True)
    loss = sum(_accumulate(state, chain, group, place) for place, group in enumerate(groups)) / len(groups)
    norm = clip_gradient(state, Processes())
    if not (math.isfinite(loss) and math.isfinite(norm)):
        state.optimizer.zero_grad(set_to_none=True)
        raise TrainingDiverged(step=state.step + 1, loss=norm if math.isfinite(loss) else loss)
    rate = state.settings.learning_rate_at(state.step)
    update_weights(state, rate)
    return StepRecord(
        step=state.step,
        loss=loss,
        implicit_accuracy=None,
        winner_margin=None,
        loser_margin=None,
        gradient_norm=norm,
        learning_rate=rate,
        pairs=0,
        seconds=time.perf_counter() - started,
        reward=float(torch.cat([group.rewards for group in groups]).mean()),
        drawn=reward.images,
        unknown=sum(None in cell for group in groups for cell in group.cells),
    )


def draw_group(state: TrainingState, data: RewardData, chain: DenoisingChain, prompt: int, place: int) -> Group:
    """The images of a prompt for the update that follows `state.step` finished ones, with what they are worth.

    place: of the group in the update; a prompt may come twice in one.
    """
    settings = state.settings
    assert settings.reward is not None  # checked in train_on_reward
    device = next(iter(state.policy.denoiser.parameters())).device
    size, name = settings.reward.group_size, data.prompts[prompt]
    rows = data.captions.rows(torch.full((size,), prompt))
    conditions = Conditions(
        rows.prompt_embeddings.to(device),
        rows.pooled.to(device),
        rows.empty_prompt_embedding.to(device),
        rows.empty_pooled.to(device),
    )
    seeds = [derive_seed(settings.seed, "reward", name, state.step, place, index) for index in range(size)]
    drawn: list[Tensor] = []
    autocast = autocast_of(state, device, Processes())
    for part in _parts(size, settings):
        one = conditions.rows(part.to(device))
        with autocast():
            drawn.append(chain.roll_out(state.policy.denoiser, one, seeds[part[0] : part[-1] + 1], data.shape))
    states = torch.cat(drawn, dim=1)
    cells = data.label(states[-1])
    rewards, advantages = (torch.from_numpy(values).float() for values in parity_rewards(cells, data.targets))
    return Group(conditions, states, advantages, rewards, cells)


def _accumulate(state: TrainingState, chain: DenoisingChain, group: Group, place: int) -> float:
    """Add a group's part of the gradient, of `settings.micro_batch` steps of images at a time; returns its loss."""
    reward = state.settings.reward
    assert reward is not None  # checked in train_on_reward
    images, places = chosen_steps(chain, state.settings, derive_seed(state.settings.seed, "steps", state.step, place))
    if reward.kl_weight == 0:
        moving = group.advantages[images] != 0
        images, places = images[moving], places[moving]
    if len(images) == 0:
        return 0.0
    total = torch.zeros((), device=group.states.device)
    for part in _parts(len(images), state.settings):
        losses = _losses(state, chain, group, images[part], places[part])
        loss = losses.sum() / (reward.group_size * reward.trained_steps)
        (loss / reward.groups).backward()  # pyright: ignore[reportUnknownMemberType]
        total += loss.detach()
    return total.item()


def _parts(count: int, settings: AlignmentSettings) -> tuple[Tensor, ...]:
    """Positions of what passes through the model at once."""
    return torch.split(torch.arange(count), settings.micro_batch or count)


def _losses(state: TrainingState, chain: DenoisingChain, group: Group, images: Tensor, places: Tensor) -> Tensor:
    """Of those steps of those images, (b,)."""
    reward = state.settings.reward
    assert reward is not None  # checked in train_on_reward
    device = group.states.device
    before = group.states[places.to(device), images.to(device)]
    after = group.states[(places + 1).to(device), images.to(device)]
    conditions = group.conditions.rows(images.to(device))
    # The reference first: switching adapters off must not happen to a live graph.
    reference = None
    autocast = autocast_of(state, device, Processes())
    if reward.kl_weight:
        with state.policy.reference() as frozen, torch.no_grad():
            with autocast():
                predicted = chain.predict(frozen, before, places, conditions)
            reference, _ = chain.step(predicted, before, places)
    with autocast():
        predicted = chain.predict(state.policy.denoiser, before, places, conditions)
    mean, deviation = chain.step(predicted, before, places)
    losses = -group.advantages.to(device)[images.to(device)] * step_log_density(after, mean, deviation)
    if reference is not None:
        # Two Gaussians of one deviation: their divergence is that of their means.
        losses = losses - reward.kl_weight * step_log_density(reference, mean, deviation)
    return losses


def chosen_steps(chain: DenoisingChain, settings: AlignmentSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Which steps of which image of a group are differentiated: images and places, each (images * trained steps,).

    Steps that start below `settings.first_timestep` are left out, and the last, which has no density.
    Raises: InvalidInput where there are fewer than are to be trained on.
    """
    assert settings.reward is not None  # checked in train_on_reward
    size, trained = settings.reward.group_size, settings.reward.trained_steps
    usable = torch.nonzero(chain.timesteps[:-1] >= settings.first_timestep).flatten()
    if len(usable) < trained:
        raise InvalidInput(
            f"the chain has {len(usable)} steps from timestep {settings.first_timestep} on, fewer than the "
            f"{trained} to be trained on. Lower reward.trained_steps or raise reward.chain_steps."
        )
    generator = torch.Generator().manual_seed(seed)
    picks = torch.rand((size, len(usable)), generator=generator).argsort(dim=1)[:, :trained]
    return torch.arange(size).repeat_interleave(trained), usable[picks].flatten()
