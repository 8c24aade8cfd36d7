"""What a training run reads: cached latents and embeddings, pairs, and the batch of any step.

A batch depends on the data, the settings and the step alone: nothing is carried from step to step, so a resumed run
needs no saved random state, and one process draws what several would draw together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from popalign_core.alignment.objective import PairLabels, number_populations
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.errors import InvalidInput
from popalign_core.seeds import derive_seed


@dataclass(frozen=True, eq=False)
class AlignmentData:
    """Encoded samples and captions, and the pairs over them.

    latent_means: (samples, c, h, w), scaled as the denoiser expects. latent_deviations: the same shape, the spread of
    the encoder's posterior, or None where latents are exact. prompt_embeddings: (captions, tokens, d); pooled:
    (captions, p); empty_*: the unconditional caption's, (tokens, d) and (p,). winner, loser: (pairs,) rows of
    latent_means; caption: (pairs,) rows of prompt_embeddings; weight: (pairs,) > 0; population: (pairs,) any integers.
    winner_caption, loser_caption: (pairs,) rows of prompt_embeddings, the captions that name the groups of each, or
    None; -1 where a loser's are unknown.
    Raises: InvalidInput on construction.
    """

    latent_means: Tensor
    prompt_embeddings: Tensor
    pooled: Tensor
    empty_prompt_embedding: Tensor
    empty_pooled: Tensor
    winner: Tensor
    loser: Tensor
    caption: Tensor
    weight: Tensor
    population: Tensor
    latent_deviations: Tensor | None = None
    winner_caption: Tensor | None = None
    loser_caption: Tensor | None = None

    def __post_init__(self) -> None:
        pairs = len(self.winner)
        if pairs == 0:
            raise InvalidInput("there are no preference pairs to train on: every prompt was refused, see `refusals`.")
        for name in ("loser", "caption", "weight", "population"):
            if len(getattr(self, name)) != pairs:
                raise InvalidInput(f"{name} has {len(getattr(self, name))} entries for {pairs} pairs.")
        _require_rows("winner", self.winner, len(self.latent_means))
        _require_rows("loser", self.loser, len(self.latent_means))
        _require_rows("caption", self.caption, len(self.prompt_embeddings))
        if self.winner_caption is not None:
            _require_rows("winner_caption", self.winner_caption, len(self.prompt_embeddings))
        if self.loser_caption is not None:
            _require_rows("loser_caption", self.loser_caption.clamp(min=0), len(self.prompt_embeddings))
        if not bool((torch.isfinite(self.weight) & (self.weight > 0)).all()):
            raise InvalidInput("every pair needs a finite weight above 0; leave a pair out instead of weighting it 0.")

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "AlignmentData":
        """From numpy arrays named like the fields."""
        return cls(**{name: torch.as_tensor(array) for name, array in arrays.items()})

    @property
    def pairs_each(self) -> float:
        """Mean number of pairs in a population."""
        return len(self.population) / len(number_populations(self.population)[1])

    @property
    def latent_elements(self) -> int:
        """Elements of one latent."""
        return self.latent_means[0].numel()


@dataclass(frozen=True, eq=False)
class NamedImages:
    """One image of each pair, winner or loser, under the caption that names its groups. Shapes as in `PairBatch`."""

    latents: Tensor
    prompt_embeddings: Tensor
    pooled: Tensor

    def part(self, mine: Tensor | slice, device: torch.device | str) -> "NamedImages":
        """Some of them, on a device. mine: (pairs,), bool, or a range."""
        return NamedImages(*(whole[mine].to(device) for whole in (self.latents, self.prompt_embeddings, self.pooled)))


@dataclass(frozen=True, eq=False)
class PairBatch:
    """One process's share of a step. Winner and loser of a pair share noise, timestep and caption.

    named: where the settings want them. global_pairs: pairs of the step over all processes; most_pairs: of the process
    that has most. The other shapes: see `AlignmentData` and `PairLabels`.
    """

    winner_latents: Tensor
    loser_latents: Tensor
    noise: Tensor
    timesteps: Tensor
    prompt_embeddings: Tensor
    pooled: Tensor
    labels: PairLabels
    pairs: Tensor
    global_pairs: int
    most_pairs: int
    named: NamedImages | None = None

    def part(self, rows: slice) -> "PairBatch":
        """Some of its pairs."""
        names = ("winner_latents", "loser_latents", "noise", "timesteps", "prompt_embeddings", "pooled", "pairs")
        labels = PairLabels(self.labels.weights[rows], self.labels.populations[rows])
        named = None if self.named is None else self.named.part(rows, self.named.latents.device)
        return replace(self, **{name: getattr(self, name)[rows] for name in names}, labels=labels, named=named)


def split_batch(batch: PairBatch, pairs: int | None) -> list[PairBatch]:
    """Consecutive parts of a batch of at most so many pairs; None leaves it whole."""
    total = len(batch.winner_latents)
    if pairs is None or pairs >= total:
        return [batch]
    return [batch.part(slice(start, start + pairs)) for start in range(0, total, pairs)]


@dataclass(frozen=True)
class Share:
    """The part of every step that one of several processes computes."""

    rank: int = 0
    processes: int = 1


WHOLE = Share()


def draw_batch(
    data: AlignmentData,
    settings: AlignmentSettings,
    step: int,
    timesteps: int,
    device: torch.device | str = "cpu",
    share: Share = WHOLE,
) -> PairBatch:
    """The batch of the update that follows `step` finished ones.

    timesteps: length of the noise schedule. Latents, noise and embeddings come as float32 on the device.
    Raises: InvalidInput if a process would get no pair.
    """
    pairs, units = order_pairs(data, settings, step)
    mine = units % share.processes == share.rank
    if not bool(mine.any()):
        raise InvalidInput(
            f"a step of {len(pairs)} pairs leaves process {share.rank} of {share.processes} without any. "
            "Raise alignment.pairs_per_step or use fewer processes."
        )
    # Everything is drawn for the whole step before it is shared out: the result must not depend on the processes.
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "alignment", "noise", step))
    shape = (len(pairs), *data.latent_means.shape[1:])
    noise = torch.randn(shape, generator=generator)
    steps = draw_timesteps(len(pairs), settings, timesteps, generator)
    dropped = torch.rand(len(pairs), generator=generator) < settings.caption_dropout
    posterior = torch.randn((2, *shape), generator=generator) if data.latent_deviations is not None else None

    captions, keep = data.caption[pairs], ~dropped
    context, vectors = _mixed_captions(data, settings, captions, generator)
    embeddings = torch.where(keep[:, None, None], context, data.empty_prompt_embedding)
    pooled = torch.where(keep[:, None], vectors, data.empty_pooled)
    winners, losers = (_latents(data, rows[pairs], posterior, k) for k, rows in enumerate((data.winner, data.loser)))
    named = _named_images(data, pairs, winners, losers, generator) if settings.preserve_weight else None
    return PairBatch(
        winner_latents=winners[mine].to(device),
        loser_latents=losers[mine].to(device),
        noise=noise[mine].to(device),
        timesteps=steps[mine].to(device),
        prompt_embeddings=embeddings[mine].float().to(device),
        pooled=pooled[mine].float().to(device),
        labels=PairLabels(data.weight[pairs][mine].float().to(device), data.population[pairs][mine].to(device)),
        pairs=pairs[mine],
        global_pairs=len(pairs),
        most_pairs=int(torch.bincount(units % share.processes).max()),
        named=None if named is None else named.part(mine, device),
    )


def _mixed_captions(
    data: AlignmentData, settings: AlignmentSettings, captions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Embeddings of the captions, each moved some of the way to another pair's caption; context and pooled.

    Few subjects are trained on; between them too the model should learn the same. After mixup (Zhang et al. 2018, arXiv
    1710.09412), of the conditions alone.
    """
    context, pooled = data.prompt_embeddings[captions], data.pooled[captions]
    if not settings.caption_mixing:
        return context, pooled
    known = torch.from_numpy(np.unique(data.caption.numpy()))
    others = known[torch.randint(len(known), (len(captions),), generator=generator)]
    shares = settings.caption_mixing * torch.rand(len(captions), generator=generator)
    return (
        context.float().lerp(data.prompt_embeddings[others].float(), shares[:, None, None]),
        pooled.float().lerp(data.pooled[others].float(), shares[:, None]),
    )


def _named_images(
    data: AlignmentData, pairs: Tensor, winners: Tensor, losers: Tensor, generator: torch.Generator
) -> NamedImages:
    """One image of each pair under the caption that names its groups. winners, losers: latents of the pairs.

    Either side by chance: winners alone seldom show the groups that there are too many of, and the model would forget
    to draw those on request.
    """
    if data.winner_caption is None:
        raise InvalidInput("alignment.preserve_weight needs the winners' own captions, which these data do not have.")
    captions = torch.full_like(pairs, -1) if data.loser_caption is None else data.loser_caption[pairs]
    is_loser = (torch.rand(len(pairs), generator=generator) < 0.5) & (captions >= 0)
    rows = torch.where(is_loser, captions, data.winner_caption[pairs])
    return NamedImages(
        torch.where(is_loser[:, None, None, None], losers, winners),
        data.prompt_embeddings[rows].float(),
        data.pooled[rows].float(),
    )


def order_pairs(data: AlignmentData, settings: AlignmentSettings, step: int) -> tuple[Tensor, Tensor]:
    """The pairs of a step and the unit each belongs to, both (pairs of the step,).

    A unit is what must not be divided between processes or steps: a pair, or a population for "popalign_exact". All
    units are visited once in a random order before any is visited again.
    """
    return _ordered(data.population, settings, step)


def drawn_pairs(population: Tensor, settings: AlignmentSettings) -> Tensor:
    """Which pairs the steps of a training draw, bool (pairs,). population: as in `AlignmentData`."""
    drawn = torch.zeros(len(population), dtype=torch.bool)
    for step in range(settings.steps):
        drawn[_ordered(population, settings, step)[0]] = True
        if bool(drawn.all()):
            break
    return drawn


def _ordered(population: Tensor, settings: AlignmentSettings, step: int) -> tuple[Tensor, Tensor]:
    if settings.objective != "popalign_exact":
        pairs = rotate(len(population), settings.pairs_per_step, settings.seed, step)
        return pairs, torch.arange(len(pairs))
    position, sizes = number_populations(population)
    per_step = max(1, settings.pairs_per_step // int(sizes.max()))
    chosen = rotate(len(sizes), per_step, settings.seed, step)
    members = [torch.nonzero(position == number).flatten() for number in chosen]
    units = [torch.full((len(rows),), unit) for unit, rows in enumerate(members)]
    return torch.cat(members), torch.cat(units)


def draw_timesteps(count: int, settings: AlignmentSettings, timesteps: int, generator: torch.Generator) -> Tensor:
    """Timesteps (count,), each uniform from the first that is trained on.

    "stratified" puts exactly one into each of `count` equal parts of the range (in random order), which removes the
    part of the gradient's variance that comes from uneven coverage. Raises: InvalidInput for an impossible first.
    """
    low, high = settings.first_timestep, timesteps
    if not 0 <= low < high:
        raise InvalidInput(f"alignment.first_timestep is {low}, expected one of the {timesteps} timesteps, from 0.")
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    if settings.timestep_sampling == "stratified":
        draws = (torch.randperm(count, generator=generator) + draws) / count
    # The clamp guards against a draw that rounds up to 1.
    return (low + (draws * (high - low)).long()).clamp(max=high - 1)


def rotate(total: int, count: int, seed: int, step: int) -> Tensor:
    """Positions step * count ... of an endless sequence of permutations of range(total), (count,)."""
    start = step * count
    first, last = start // total, (start + count - 1) // total
    orders = [_permutation(total, seed, epoch) for epoch in range(first, last + 1)]
    offset = start - first * total
    return torch.cat(orders)[offset : offset + count]


def _permutation(total: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "alignment", "order", epoch))
    return torch.randperm(total, generator=generator)


def _latents(data: AlignmentData, rows: Tensor, posterior: Tensor | None, side: int) -> Tensor:
    means = data.latent_means[rows].float()
    if posterior is None or data.latent_deviations is None:
        return means
    return means + data.latent_deviations[rows].float() * posterior[side]


def _require_rows(name: str, rows: Tensor, total: int) -> None:
    if not bool(((rows >= 0) & (rows < total)).all()):
        raise InvalidInput(f"{name} names a row outside 0..{total - 1}.")
