"""Images that a training draws are encoded once a run; what it does not draw is not encoded at all."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from popalign_core.alignment.cache import AlignmentData, Share, draw_batch, drawn_pairs, order_pairs
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.errors import NotCommitted
from storage.image_latents import LATENTS, remove_latents
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.alignment_data import alignment_data, encode_share
from tasks.run import reference

RUN, PAIRS = "r", 12
# 2 steps of 3 pairs: half of them.
SETTINGS = AlignmentSettings(steps=2, pairs_per_step=3, seed=5)


@pytest.fixture
def model() -> SdxlModel:
    return load_sdxl(ModelSource("emoji"), device="cpu")


@pytest.fixture
def encoded(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many different images were encoded since it was last asked."""
    really, seen = model.encode_images, set[bytes]()

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.update(image.numpy().tobytes() for image in pixels)
        return really(pixels)

    def count() -> int:
        found = len(seen)
        seen.clear()
        return found

    monkeypatch.setattr(model, "encode_images", encode)
    return count


def commit_preferences(root: Path, *, hashed: bool = True, left_out: int | None = None) -> ArtifactRef:
    """Images of noise in two shards, and pairs of three populations."""
    pictures = np.random.default_rng(0).integers(0, 256, (2 * PAIRS, 64, 64, 3), dtype=np.uint8)
    stored = [encode_image(picture) for picture in pictures]
    for shard in range(2):
        places = [n for n in range(2 * PAIRS) if n % 2 == shard and n != left_out]
        samples = [
            {"run_id": RUN, "model_id": "base", "prompt_id": "p", "sample_index": n, "sample_id": f"s{n:02d}"}
            | {"seed": n, "width": 64, "height": 64, "sampler_fingerprint": ""}
            | {"image_sha256": hashlib.sha256(stored[n]).hexdigest() if hashed else ""}
            for n in places
        ]
        images = [{"sample_id": f"s{n:02d}", "image": stored[n], "format": FORMAT} for n in places]
        with staged_artifact(reference(str(root), RUN, "samples", f"base.round-1.{shard:05d}")) as folder:
            write_rows(folder, "samples", samples)
            write_rows(folder, "images", images)
    pairs = [
        {
            "run_id": RUN,
            "round": 1,
            "pair_id": f"p/{n}",
            "population_id": f"p{n // 4}",
            "prompt_id": "prompt",
            "caption": "a photo of a judge",
            "winner_sample_id": f"s{n:02d}",
            "loser_sample_id": f"s{n + PAIRS:02d}",
            "weight": 1.0,
        }
        for n in range(PAIRS)
    ]
    ref = reference(str(root), RUN, "populations", "round-1")
    with staged_artifact(ref) as folder:
        write_rows(folder, "preferences", pairs)
    return ref


def same_batches(first: AlignmentData, second: AlignmentData, settings: AlignmentSettings) -> bool:
    """Whether all steps draw the same, bit for bit, and numbers."""
    for step in range(settings.steps):
        one, other = (draw_batch(data, settings, step, 1000) for data in (first, second))
        for name in ("winner_latents", "loser_latents", "noise", "pairs", "timesteps"):
            assert bool(torch.isfinite(getattr(one, name)).all())
            if not torch.equal(getattr(one, name), getattr(other, name)):
                return False
    return True


@pytest.mark.parametrize("objective", ["popalign", "popalign_exact"])
def test_only_what_the_training_draws_is_encoded(
    tmp_path: Path, model: SdxlModel, encoded: Callable[[], int], objective: str
) -> None:
    preferences = commit_preferences(tmp_path, hashed=False)
    settings = AlignmentSettings(objective=objective, steps=2, pairs_per_step=3 if objective == "popalign" else 4)
    whole = alignment_data(preferences, model, named=False)
    assert encoded() == 2 * PAIRS
    drawn = alignment_data(preferences, model, named=False, settings=settings)
    assert encoded() == 2 * (6 if objective == "popalign" else 8)
    assert same_batches(drawn, whole, settings)
    never = ~drawn_pairs(drawn.population, settings)
    assert bool(torch.isnan(drawn.latent_means[drawn.winner[never]]).all()), "a mistake would stop the training"


def test_drawn_pairs_are_those_of_the_steps() -> None:
    population = torch.arange(40) // 5
    for settings in (SETTINGS, AlignmentSettings(steps=3, pairs_per_step=12, objective="popalign_exact")):
        data = AlignmentData(
            *(torch.zeros(80, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1)),
            *(torch.arange(40), torch.arange(40, 80), torch.zeros(40).long(), torch.ones(40), population),
        )
        pairs = torch.cat([order_pairs(data, settings, step)[0] for step in range(settings.steps)])
        assert torch.nonzero(drawn_pairs(population, settings)).flatten().tolist() == sorted(set(pairs.tolist()))
    assert bool(drawn_pairs(population, AlignmentSettings(steps=100, pairs_per_step=3)).all())


def test_resumes_rounds_and_seeds_encode_nothing_again(
    tmp_path: Path, model: SdxlModel, encoded: Callable[[], int]
) -> None:
    preferences = commit_preferences(tmp_path)
    first = alignment_data(preferences, model, named=False, settings=SETTINGS)
    assert encoded() == 12
    again = alignment_data(preferences, model, named=False, settings=SETTINGS)
    assert encoded() == 0
    assert same_batches(first, again, SETTINGS)
    further = AlignmentSettings(steps=4, pairs_per_step=3, seed=5)
    longer = alignment_data(preferences, model, named=False, settings=further)
    assert encoded() == 12, "the other half"
    assert same_batches(longer, alignment_data(preferences, model, named=False), further)
    assert encoded() == 0
    # 8 channels, 16 x 16 positions: see `storage.image_latents`.
    kept = list((tmp_path / "runs" / RUN / LATENTS).glob("*/*.npz"))
    assert len(kept) == 2 * PAIRS
    assert all(path.stat().st_size < 2 * 4 * 8 * 16 * 16 + 1024 for path in kept)


def test_what_is_damaged_or_removed_is_encoded_again_alike(
    tmp_path: Path, model: SdxlModel, encoded: Callable[[], int]
) -> None:
    preferences = commit_preferences(tmp_path)
    first = alignment_data(preferences, model, named=False)
    encoded()
    for number, path in enumerate(sorted((tmp_path / "runs" / RUN / LATENTS).glob("*/*.npz"))):
        if number < 2:
            path.write_bytes(path.read_bytes()[:-100])
        elif number < 5:
            path.unlink()
    again = alignment_data(preferences, model, named=False)
    assert encoded() == 5
    assert torch.equal(again.latent_means, first.latent_means)
    remove_latents(Workspace(tmp_path), RUN)
    assert torch.equal(alignment_data(preferences, model, named=False).latent_means, first.latent_means)
    assert encoded() == 2 * PAIRS


def test_another_vae_does_not_get_these(tmp_path: Path, model: SdxlModel, encoded: Callable[[], int]) -> None:
    preferences = commit_preferences(tmp_path)
    first = alignment_data(preferences, model, named=False)
    encoded()
    with torch.no_grad():
        next(model.pipeline.vae.parameters()).add_(1e-2)
    other = alignment_data(preferences, model, named=False)
    assert encoded() == 2 * PAIRS
    assert not torch.equal(other.latent_means, first.latent_means)


def test_processes_encode_a_part_each(tmp_path: Path, model: SdxlModel, encoded: Callable[[], int]) -> None:
    preferences = commit_preferences(tmp_path)
    counts = []
    for rank in range(3):
        encode_share(preferences, model, SETTINGS, Share(rank, 3), kept_latents=False)
        counts.append(encoded())
    assert counts == [4, 4, 4]
    data = alignment_data(preferences, model, named=False, settings=SETTINGS)
    assert encoded() == 0
    remove_latents(Workspace(tmp_path), RUN)
    assert same_batches(data, alignment_data(preferences, model, named=False, settings=SETTINGS), SETTINGS)


def test_an_image_that_is_gone_is_told(tmp_path: Path, model: SdxlModel) -> None:
    preferences = commit_preferences(tmp_path, left_out=3)
    with pytest.raises(NotCommitted, match="1 of 24 images to train on are not in run r, such as s03"):
        alignment_data(preferences, model, named=False)
