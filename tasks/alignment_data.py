"""What a round trains on: latents of the images in use, embeddings of their captions, each computed once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from popalign_core.alignment.cache import AlignmentData, Share, drawn_pairs
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.classification import Status
from popalign_core.errors import InvalidInput
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.tensor_arrays import from_bytes
from storage.artifacts import ArtifactRef, committed_keys
from storage.layout import Workspace
from storage.tables import read_artifact, read_rows
from tasks.embeddings import provide_embeddings
from tasks.image_latents import ImageLatents, Moments
from tasks.run import read_prompts

SIDES = ("winner_sample_id", "loser_sample_id")


def alignment_data(
    preferences: ArtifactRef,
    model: TextToImageModel,
    *,
    named: bool,
    kept_latents: bool = False,
    settings: AlignmentSettings | None = None,
) -> AlignmentData:
    """Reads the pairs of committed preferences. named: with the captions that name the groups of either.

    kept_latents: take what the images were decoded from, where all of it was kept, instead of encoding the images: not
    the same data, as neither rounding to pixels nor the VAE's encoder has touched it. `data_kind` says which it was.
    settings: of the training; what its steps do not draw has no latents, but numbers that are none. None: all is drawn.

    Raises: InvalidInput where there are no pairs; NotCommitted where an image is not there.
    """
    pairs = _pairs(preferences)
    winners, losers = _named_captions(preferences, pairs) if named else ([], [])
    captions = sorted({row["caption"] for row in pairs} | {text for text in (*winners, *losers) if text is not None})
    place_of = {text: place for place, text in enumerate(captions)}
    populations = sorted({row["population_id"] for row in pairs})
    population = _positions(pairs, "population_id", populations)
    provide_embeddings(preferences.workspace, model, captions)
    samples = _drawn_samples(pairs, population, settings)
    winner, loser = (_positions(pairs, side, samples) for side in SIDES)
    kept = kept_latents and _all_kept(preferences, pairs)
    found = _kept_latents(preferences, samples) if kept else ImageLatents(preferences, model, samples).all()
    mean, *deviation = _by_row(found, samples, rows=int(torch.cat([winner, loser]).max()) + 1)

    return AlignmentData(
        latent_means=mean,
        latent_deviations=deviation[0] if deviation else None,
        winner=winner,
        loser=loser,
        caption=_positions(pairs, "caption", captions),
        weight=torch.tensor([row["weight"] for row in pairs], dtype=torch.float32),
        population=population,
        winner_caption=torch.tensor([place_of[text] for text in winners]) if named else None,
        loser_caption=torch.tensor([place_of.get(text, -1) for text in losers]) if named else None,
        **model.encode_captions(captions),
    )


def encode_share(
    preferences: ArtifactRef, model: TextToImageModel, settings: AlignmentSettings, share: Share, *, kept_latents: bool
) -> None:
    """Encodes one process's share of the images that a training draws; `alignment_data` then finds all of them."""
    pairs = _pairs(preferences)
    if kept_latents and _all_kept(preferences, pairs):
        return
    population = _positions(pairs, "population_id", sorted({row["population_id"] for row in pairs}))
    ImageLatents(preferences, model, _drawn_samples(pairs, population, settings)).encode(share)


def _pairs(preferences: ArtifactRef) -> list[dict[str, Any]]:
    if pairs := read_artifact(preferences, "preferences"):
        return pairs
    raise InvalidInput(
        f"{preferences.key} has no preference pairs: every prompt was refused. Reasons: "
        'popalign sql "SELECT reason, count(*) FROM refusals GROUP BY reason"; more images.train_specific helps.'
    )


def _drawn_samples(
    pairs: Sequence[Mapping[str, Any]], population: torch.Tensor, settings: AlignmentSettings | None
) -> list[str]:
    drawn = [True] * len(pairs) if settings is None else drawn_pairs(population, settings).tolist()
    return sorted({row[side] for row, used in zip(pairs, drawn, strict=True) if used for side in SIDES})


def _by_row(found: Iterable[tuple[str, Moments]], samples: Sequence[str], rows: int) -> list[torch.Tensor]:
    """Each part of the moments, (rows, c, h, w), in the order of the samples; a row without one has no numbers."""
    place_of = {sample: place for place, sample in enumerate(samples)}
    whole: list[torch.Tensor] = []
    for sample, moments in found:
        whole = whole or [torch.full((rows, *part.shape), torch.nan) for part in moments]
        for into, part in zip(whole, moments, strict=True):
            into[place_of[sample]] = part
    return whole


def data_kind(data: AlignmentData) -> str:
    """What the latents of training data are, for its manifest."""
    return "encoded from stored images" if data.latent_deviations is not None else "kept from sampling"


def _all_kept(preferences: ArtifactRef, pairs: Sequence[Mapping[str, Any]]) -> bool:
    samples = {row[side] for row in pairs for side in SIDES}
    place, columns = Workspace(Path(preferences.workspace)), ["sample_id"]
    rows = read_rows(place, preferences.run_id, "latents", columns=columns, equal={"sample_id": list(samples)})
    return len(rows) == len(samples)


def _kept_latents(preferences: ArtifactRef, samples: Sequence[str]) -> Iterator[tuple[str, Moments]]:
    """Latents of samples in float32, as they were decoded, shard by shard."""
    place, run_id = Workspace(Path(preferences.workspace)), preferences.run_id
    for shard in committed_keys(place, run_id, "samples"):
        for row in read_rows(place, run_id, "latents", equal={"sample_id": list(samples)}, keys=[shard.key]):
            yield row["sample_id"], (from_bytes(row["latents"], row["shape"], row["dtype"]).float(),)


def _positions(pairs: Sequence[Mapping[str, Any]], column: str, values: Sequence[str]) -> torch.Tensor:
    """Where each pair's value is among the values; after the last where it is not."""
    position = {value: index for index, value in enumerate(values)}
    return torch.tensor([position.get(row[column], len(values)) for row in pairs], dtype=torch.int64)


def _named_captions(preferences: ArtifactRef, pairs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str | None]]:
    """The text that each pair's winner was drawn from, and the one that names what its loser is perceived as."""
    place = Workspace(Path(preferences.workspace))
    winners, losers = ([row[side] for row in pairs] for side in SIDES)
    samples = read_rows(
        place, preferences.run_id, "samples", columns=["sample_id", "prompt_id"], equal={"sample_id": winners}
    )
    prompt_of = {row["sample_id"]: row["prompt_id"] for row in samples}
    prompts = read_prompts(preferences.workspace, preferences.run_id)
    text_of = {prompt.prompt_id: prompt.text for prompt in prompts}
    named = {(p.parent_id, frozenset(p.requested.items())): p.text for p in prompts if p.parent_id is not None}
    perceived: dict[str, dict[str, str]] = {}
    columns = ["sample_id", "axis", "label", "status"]
    # Further axes may have been added to the run since.
    wanted = {"sample_id": losers, "axis": sorted({axis for prompt in prompts for axis in prompt.requested})}
    for row in read_rows(place, preferences.run_id, "attributes", columns=columns, equal=wanted):
        if row["status"] == Status.OK:
            perceived.setdefault(row["sample_id"], {})[row["axis"]] = row["label"]
    shown = [(row["prompt_id"], frozenset(perceived.get(row["loser_sample_id"], {}).items())) for row in pairs]
    return [text_of[prompt_of[winner]] for winner in winners], [named.get(key) for key in shown]
