"""What a round trains on: latents of the images in use, embeddings of their captions, each computed once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from popalign_core.alignment.cache import AlignmentData
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import SdxlModel
from storage.artifacts import ArtifactRef
from storage.images import decode_image
from storage.layout import Workspace
from storage.tables import read_artifact, read_images, read_rows
from tasks.run import read_prompts

ENCODE_BATCH = 64


def alignment_data(preferences: ArtifactRef, model: SdxlModel, *, named: bool) -> AlignmentData:
    """Reads the pairs of committed preferences. named: with the captions that name the winners' groups.

    Raises: InvalidInput where there are no pairs.
    """
    pairs = read_artifact(preferences, "preferences")
    if not pairs:
        raise InvalidInput(
            f"{preferences.key} has no preference pairs: every prompt was refused. Reasons: "
            'popalign sql "SELECT reason, count(*) FROM refusals GROUP BY reason"; more images.train_specific helps.'
        )
    samples = sorted({row[side] for row in pairs for side in ("winner_sample_id", "loser_sample_id")})
    own_captions = _winner_captions(preferences, pairs) if named else []
    captions = sorted({row["caption"] for row in pairs} | set(own_captions))
    populations = sorted({row["population_id"] for row in pairs})
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
        winner_caption=torch.tensor([captions.index(text) for text in own_captions]) if named else None,
        **model.encode_captions(captions),
    )


def _positions(pairs: Sequence[Mapping[str, Any]], column: str, values: Sequence[str]) -> torch.Tensor:
    position = {value: index for index, value in enumerate(values)}
    return torch.tensor([position[row[column]] for row in pairs], dtype=torch.int64)


def _winner_captions(preferences: ArtifactRef, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text that each pair's winner was drawn from."""
    place = Workspace(Path(preferences.workspace))
    winners = [row["winner_sample_id"] for row in pairs]
    samples = read_rows(
        place, preferences.run_id, "samples", columns=["sample_id", "prompt_id"], equal={"sample_id": winners}
    )
    prompt_of = {row["sample_id"]: row["prompt_id"] for row in samples}
    text_of = {prompt.prompt_id: prompt.text for prompt in read_prompts(preferences.workspace, preferences.run_id)}
    return [text_of[prompt_of[winner]] for winner in winners]


def _encoded(images: Sequence[bytes], model: SdxlModel) -> tuple[torch.Tensor, torch.Tensor]:
    means, deviations = [], []
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = np.stack([decode_image(data) for data in images[start : start + ENCODE_BATCH]])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, deviation = model.encode_images(tensor)
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
