"""What a round trains on: latents of the images in use, embeddings of their captions, each computed once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from popalign_core.alignment.cache import AlignmentData
from popalign_core.classification import Status
from popalign_core.errors import InvalidInput
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.tensor_arrays import from_bytes
from storage.artifacts import ArtifactRef
from storage.images import decode_images
from storage.layout import Workspace
from storage.tables import read_artifact, read_images, read_rows
from tasks.embeddings import provide_embeddings
from tasks.run import read_prompts

# At once, and of no more pixels than one image of SDXL has: the VAE takes 2.5 GiB for that in float32.
ENCODE_BATCH, ENCODE_PIXELS = 64, 1024**2


def alignment_data(
    preferences: ArtifactRef, model: TextToImageModel, *, named: bool, kept_latents: bool = False
) -> AlignmentData:
    """Reads the pairs of committed preferences. named: with the captions that name the groups of either.

    kept_latents: take what the images were decoded from, where all of it was kept, instead of encoding the images: not
    the same data, as neither rounding to pixels nor the VAE's encoder has touched it. `data_kind` says which it was.

    Raises: InvalidInput where there are no pairs.
    """
    pairs = read_artifact(preferences, "preferences")
    if not pairs:
        raise InvalidInput(
            f"{preferences.key} has no preference pairs: every prompt was refused. Reasons: "
            'popalign sql "SELECT reason, count(*) FROM refusals GROUP BY reason"; more images.train_specific helps.'
        )
    samples = sorted({row[side] for row in pairs for side in ("winner_sample_id", "loser_sample_id")})
    winners, losers = _named_captions(preferences, pairs) if named else ([], [])
    captions = sorted({row["caption"] for row in pairs} | {text for text in (*winners, *losers) if text is not None})
    place_of = {text: place for place, text in enumerate(captions)}
    populations = sorted({row["population_id"] for row in pairs})
    provide_embeddings(preferences.workspace, model, captions)
    mean = _kept_latents(preferences, samples) if kept_latents else None
    deviation = None
    if mean is None:
        stored = read_images(Workspace(Path(preferences.workspace)), preferences.run_id, samples)
        mean, deviation = _encoded([stored[sample] for sample in samples], model)

    return AlignmentData(
        latent_means=mean,
        latent_deviations=deviation,
        winner=_positions(pairs, "winner_sample_id", samples),
        loser=_positions(pairs, "loser_sample_id", samples),
        caption=_positions(pairs, "caption", captions),
        weight=torch.tensor([row["weight"] for row in pairs], dtype=torch.float32),
        population=_positions(pairs, "population_id", populations),
        winner_caption=torch.tensor([place_of[text] for text in winners]) if named else None,
        loser_caption=torch.tensor([place_of.get(text, -1) for text in losers]) if named else None,
        **model.encode_captions(captions),
    )


def data_kind(data: AlignmentData) -> str:
    """What the latents of training data are, for its manifest."""
    return "encoded from stored images" if data.latent_deviations is not None else "kept from sampling"


def _kept_latents(preferences: ArtifactRef, samples: Sequence[str]) -> torch.Tensor | None:
    """Latents of samples in float32, as they were decoded; None where any was not kept."""
    rows = read_rows(
        Workspace(Path(preferences.workspace)), preferences.run_id, "latents", equal={"sample_id": list(samples)}
    )
    if len(rows) < len(samples):
        return None
    found = {row["sample_id"]: from_bytes(row["latents"], row["shape"], row["dtype"]).float() for row in rows}
    return torch.stack([found[sample] for sample in samples])


def _positions(pairs: Sequence[Mapping[str, Any]], column: str, values: Sequence[str]) -> torch.Tensor:
    position = {value: index for index, value in enumerate(values)}
    return torch.tensor([position[row[column]] for row in pairs], dtype=torch.int64)


def _named_captions(preferences: ArtifactRef, pairs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str | None]]:
    """The text that each pair's winner was drawn from, and the one that names what its loser is perceived as."""
    place = Workspace(Path(preferences.workspace))
    winners, losers = ([row[side] for row in pairs] for side in ("winner_sample_id", "loser_sample_id"))
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


def encode_batch(side: int) -> int:
    """Images of so many pixels a side that the VAE encodes at once."""
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // side**2))


def _encoded(images: Sequence[bytes], model: TextToImageModel) -> tuple[torch.Tensor, torch.Tensor]:
    means, deviations = [], []
    size = encode_batch(decode_images(images[:1]).shape[1])
    for start in range(0, len(images), size):
        pixels = decode_images(images[start : start + size])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, deviation = model.encode_images(tensor)
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
