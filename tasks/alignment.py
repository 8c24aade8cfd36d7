"""One round of fine-tuning."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.objective import nats_per_unit_error, natural_beta
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord, train
from popalign_core.config import AlignmentConfig, RunConfig
from popalign_core.errors import InvalidInput
from popalign_core.models.sdxl import SdxlModel, load_sdxl
from popalign_core.models.trainable import make_policy, noise_schedule, save_weights
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.images import decode_image
from storage.layout import Workspace
from storage.tables import read_artifact, read_images, write_rows
from tasks.progress import progress_of
from tasks.run import as_row, model_source, reference, timed

ENCODE_BATCH = 64


def alignment_settings(config: AlignmentConfig, seed: int, round_index: int) -> AlignmentSettings:
    """The stage's part of the configuration as plain values."""
    values = config.model_dump(
        include={"objective", "steps", "pairs_per_step", "learning_rate", "beta", "anchor_weight"}
    )
    round_seed = derive_seed(seed, "alignment", round_index)
    return AlignmentSettings(**values, seed=round_seed, timestep_sampling="stratified")


@task(cache_policy=NO_CACHE)
def align_round(preferences: ArtifactRef, config: RunConfig, parent_id: str, round_index: int) -> ArtifactRef:
    """Trains from the parent model on a round's preferences; commits weights, `models` and `training_steps`.

    A number that is none stops the training and commits nothing.
    """
    model_id = f"round-{round_index}"
    ref = reference(preferences.workspace, preferences.run_id, "models", model_id)
    if is_committed(ref):
        return ref
    source = model_source(ref.workspace, ref.run_id, config, parent_id)
    # A fresh load: training changes the weights in place, and the cached model must stay what its source names.
    # Full fine-tuning needs float32 master weights.
    dtype = config.sampling.dtype if config.alignment.lora_rank else "float32"
    earlier = None if source.lora is None else Path(source.lora)
    model = load_sdxl(replace(source, lora=None), device=config.device, dtype=dtype)
    with timed(ref, "alignment", model.device.type) as facts:
        data = _alignment_data(preferences, model)
        settings = alignment_settings(config.alignment, config.seed, round_index)
        nats = nats_per_unit_error(noise_schedule(model), data.latent_elements)
        natural = natural_beta(settings.beta, nats, settings.objective, config.populations.size)
        get_run_logger().info("beta %g is %s in units of log-likelihood", settings.beta, natural)
        policy = make_policy(model, lora_rank=config.alignment.lora_rank, seed=settings.seed, earlier_lora=earlier)
        records = list(_watched(train(policy, data, settings), f"alignment {model_id}"))
        facts["items"] = len(records)
        row = {
            "run_id": ref.run_id,
            "model_id": model_id,
            "parent_model_id": parent_id,
            "objective": settings.objective,
            "adapter": "lora" if config.alignment.lora_rank else "full",
            "round": round_index,
            "seed": settings.seed,
            "steps": len(records),
            "beta": settings.beta,
            "natural_beta": natural,
        }
        with staged_artifact(ref) as folder:
            save_weights(policy, folder, lora=bool(config.alignment.lora_rank))
            write_rows(folder, "models", [row])
            write_rows(folder, "training_steps", [_step_row(ref.run_id, model_id, round_index, r) for r in records])
    return ref


def _watched(records: Iterator[StepRecord], description: str) -> Iterator[StepRecord]:
    with progress_of(description) as advance:
        for record in records:
            advance(1)
            yield record


def _step_row(run_id: str, model_id: str, round_index: int, record: StepRecord) -> dict[str, object]:
    # Wall time differs from run to run; it is in `timings`.
    row = as_row(run_id, record, model_id=model_id, round=round_index)
    del row["seconds"]
    return row


def _alignment_data(preferences: ArtifactRef, model: SdxlModel) -> AlignmentData:
    """Latents of the images in use and embeddings of their captions, each computed once."""
    pairs = read_artifact(preferences, "preferences")
    if not pairs:
        raise InvalidInput(
            f"{preferences.key} has no preference pairs: every prompt was refused. Reasons: "
            'popalign sql "SELECT reason, count(*) FROM refusals GROUP BY reason"; more images.train_specific helps.'
        )
    samples = sorted({row[side] for row in pairs for side in ("winner_sample_id", "loser_sample_id")})
    captions = sorted({row["caption"] for row in pairs})
    populations = sorted({row["population_id"] for row in pairs})
    stored = read_images(Workspace(Path(preferences.workspace)), preferences.run_id, samples)
    mean, deviation = _encoded([stored[sample] for sample in samples], model)
    embeddings, empty = model.encode_prompts(captions), model.encode_unconditional()

    def rows(column: str, values: Sequence[str]) -> torch.Tensor:
        position = {value: index for index, value in enumerate(values)}
        return torch.tensor([position[row[column]] for row in pairs], dtype=torch.int64)

    return AlignmentData(
        latent_means=mean,
        latent_deviations=deviation,
        prompt_embeddings=embeddings.context.float(),
        pooled=embeddings.pooled.float(),
        empty_prompt_embedding=empty.context[0].float(),
        empty_pooled=empty.pooled[0].float(),
        winner=rows("winner_sample_id", samples),
        loser=rows("loser_sample_id", samples),
        caption=rows("caption", captions),
        weight=torch.tensor([row["weight"] for row in pairs], dtype=torch.float32),
        population=rows("population_id", populations),
    )


def _encoded(images: Sequence[bytes], model: SdxlModel) -> tuple[torch.Tensor, torch.Tensor]:
    means, deviations = [], []
    for start in range(0, len(images), ENCODE_BATCH):
        pixels = np.stack([decode_image(data) for data in images[start : start + ENCODE_BATCH]])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, deviation = model.encode_images(tensor)
        means.append(mean)
        deviations.append(deviation)
    return torch.cat(means), torch.cat(deviations)
