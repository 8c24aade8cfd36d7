"""A demographic-parity reward: what each image of a prompt does to the distance of its population from the target.

With p the shares of the perceived groups and q the target, the goal to be raised is J = -1/2 |p - q|^2, summed over
axes. Its gradient is the policy gradient E[(q - p)_k grad log p(x)], k the group that image x shows: to show group k is
worth q_k - p_k. Rewards of whole populations: Zhang et al. 2024 (arXiv 2401.12244, parity over a minibatch).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.attributes import Axis
from popalign_core.errors import InvalidInput

Cell = tuple[str | None, ...]
# Of an image whose group cannot be told. Below q_k - p_k of every group at any time, even of one that is all there is,
# so that to draw people who cannot be read never pays.
UNKNOWN_REWARD = -1.0


@dataclass(frozen=True)
class RewardSettings:
    """What a policy gradient needs beside `AlignmentSettings`, whose `steps` are its updates of the weights.

    group_size: images of a prompt that are judged together, >= 2. groups: prompts of an update. chain_steps: of the
    denoising chain that they are drawn by, and guidance_scale its guidance. trained_steps: how many of an image's steps
    are differentiated, chosen by chance. kl_weight: of the KL divergence from the reference in a step, in nats a latent
    element. Raises: InvalidInput.
    """

    group_size: int = 12
    groups: int = 6
    chain_steps: int = 10
    guidance_scale: float = 1.0
    trained_steps: int = 3
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "group_size": 2,
            "groups": 1,
            "chain_steps": 2,
            "trained_steps": 1,
            "guidance_scale": 1,
            "kl_weight": 0,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= low):
                raise InvalidInput(f"reward.{name} is {value}, expected a number of at least {low}.")

    @property
    def images(self) -> int:
        """Images drawn for one update."""
        return self.groups * self.group_size


@dataclass(frozen=True, eq=False)
class ParityTarget:
    """An axis with the shares to arrive at, (groups,), sum 1."""

    axis: Axis
    shares: np.ndarray

    def rewards(self, counts: np.ndarray) -> np.ndarray:
        """What one more image is worth to a population, by group and last as unknown, (groups + 1,).

        counts: (groups,), known images; where there are none, every group is worth nothing.
        """
        shares = counts / counts.sum() if counts.sum() else self.shares
        return np.append(self.shares - shares, UNKNOWN_REWARD)


def parity_rewards(cells: Sequence[Cell], targets: Sequence[ParityTarget]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and group-relative advantages of the images of one prompt, each (images,), summed over the axes.

    cells: an image's group on each axis, None where it is unknown. An image is judged by the others alone: its reward
    is what it adds to their population, and its advantage is that less what they would be worth there on average. Both
    the shares and the baseline are then independent of the image, so that mean(advantage * grad log p) is an unbiased
    estimate of the gradient of J (Kool et al. 2019, leave-one-out baseline). Advantages are not divided by their
    deviation, which would blow up the chance differences of a population on its target (Liu et al. 2025, arXiv
    2503.20783). They are 0 where all images show the same: a prompt that never shows a group teaches nothing.
    Raises: InvalidInput for fewer than 2 images or cells of another length.
    """
    if len(cells) < 2:
        raise InvalidInput(f"a group has {len(cells)} images; relative rewards need at least 2 (reward.group_size).")
    if any(len(cell) != len(targets) for cell in cells):
        raise InvalidInput(f"cells have {sorted({len(cell) for cell in cells})} groups for {len(targets)} axes.")
    rewards, advantages = np.zeros(len(cells)), np.zeros(len(cells))
    for place, target in enumerate(targets):
        shown = np.array([_position(cell[place], target.axis) for cell in cells])
        counts = np.bincount(shown, minlength=len(target.axis.groups) + 1)
        for image, group in enumerate(shown):
            others = counts.copy()
            others[group] -= 1
            worth = target.rewards(others[:-1])
            rewards[image] += worth[group]
            advantages[image] += worth[group] - (others @ worth) / (len(cells) - 1)
    return rewards, advantages


def _position(label: str | None, axis: Axis) -> int:
    """Of a group on its axis; after the last one if unknown."""
    return len(axis.groups) if label is None else axis.groups.index(label)
