"""One round of fine-tuning."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from popalign_core.alignment.adapters import Policy, substituted_weights
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.objective import nats_per_unit_error, natural_beta
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.alignment.trainer import StepRecord, train
from popalign_core.config import AlignmentConfig, RunConfig
from popalign_core.models.sdxl import load_sdxl
from popalign_core.models.trainable import make_policy, noise_schedule, save_weights
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.checkpoints import latest_checkpoint, remove_checkpoints, staged_checkpoint
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.alignment_data import alignment_data
from tasks.progress import progress_of
from tasks.run import as_row, loaded_model, model_source, reference, timed

RECORDS = "records.json"
WHOLE_TRAINING = "alignment"


def alignment_settings(config: AlignmentConfig, seed: int, round_index: int) -> AlignmentSettings:
    """The stage's part of the configuration as plain values.

    Without `redraw` all rounds are one training, which the later ones take further.
    """
    names = "objective pairs_per_step learning_rate_schedule first_timestep beta anchor_weight preserve_weight "
    names += "winner_preserving ema_decay caption_dropout caption_mixing"
    values = config.model_dump(include=set(names.split()))
    first, rounds = (round_index, 1) if config.redraw else (1, round_index)
    return AlignmentSettings(
        **values,
        learning_rate=config.learning_rate * (config.round_decay ** (round_index - 1) if config.redraw else 1),
        steps=rounds * config.steps,
        schedule_steps=config.steps if config.redraw else config.rounds * config.steps,
        seed=derive_seed(seed, "alignment", first),
        timestep_sampling="stratified",
    )


@task(cache_policy=NO_CACHE)
def align_round(preferences: ArtifactRef, config: RunConfig, parent_id: str, round_index: int) -> ArtifactRef:
    """Trains from the parent model on a round's preferences; commits weights, `models` and `training_steps`.

    A number that is none stops the training and commits nothing.
    """
    ref = reference(preferences.workspace, preferences.run_id, "models", f"round-{round_index}")
    place = Workspace(Path(ref.workspace))
    if is_committed(ref):
        if config.alignment.redraw:  # a crash may have come between the commit and this
            remove_checkpoints(place, ref.run_id, ref.key)
        return ref
    loaded_model.cache_clear()  # the sampler makes room for policy and reference
    source = model_source(ref.workspace, ref.run_id, config, parent_id)
    # A fresh load: training changes the weights in place, and the cached model must stay what its source names.
    # Full fine-tuning needs float32 master weights.
    dtype = config.sampling.dtype if config.alignment.lora_rank else "float32"
    earlier = None if source.lora is None else Path(source.lora)
    model = load_sdxl(replace(source, lora=None), device=config.device, dtype=dtype)
    with timed(ref, "alignment", model.device.type) as facts:
        data = alignment_data(preferences, model, named=config.alignment.preserve_weight > 0)
        settings = alignment_settings(config.alignment, config.seed, round_index)
        nats = nats_per_unit_error(noise_schedule(model), data.latent_elements, settings.first_timestep)
        row = _model_row(ref, config, settings, natural_beta(settings.beta, nats, settings.objective, data.pairs_each))
        row |= {"parent_model_id": parent_id, "round": round_index}
        get_run_logger().info("beta %g is %s in units of log-likelihood", settings.beta, row["natural_beta"])
        policy = make_policy(
            model,
            lora_rank=config.alignment.lora_rank,
            trainable=config.alignment.trainable,
            seed=settings.seed,
            earlier_lora=earlier,
            gradient_checkpointing=config.alignment.gradient_checkpointing,
            image_size=config.sampling.image_size,
        )
        records, average = _train(policy, data, settings, ref, config.alignment)
        records = records[-config.alignment.steps :]
        facts["items"] = len(records)
        with staged_artifact(ref) as folder:
            kept = nullcontext() if average is None else substituted_weights(policy.denoiser, average)
            with kept:
                save_weights(policy, folder, lora=bool(config.alignment.lora_rank))
            write_rows(folder, "models", [row])
            write_rows(folder, "training_steps", [_step_row(ref, round_index, record) for record in records])
    if config.alignment.redraw:
        remove_checkpoints(place, ref.run_id, ref.key)
    return ref


def _train(
    policy: Policy, data: AlignmentData, settings: AlignmentSettings, ref: ArtifactRef, config: AlignmentConfig
) -> tuple[list[StepRecord], dict[str, Tensor] | None]:
    """Goes on from the last checkpoint, and saves one now and then; the records of all steps, the average if kept."""
    name = ref.key if config.redraw else WHOLE_TRAINING
    place = Workspace(Path(ref.workspace))
    folder = latest_checkpoint(place, ref.run_id, name)
    records: list[StepRecord] = []
    if folder is None:
        state = begin(policy, settings)
    else:
        state = load_state(policy, settings, folder)
        records = [StepRecord(**values) for values in json.loads((folder / RECORDS).read_text())]
    with progress_of(f"alignment {ref.key}") as advance:
        advance(max(0, state.step - (settings.steps - config.steps)))
        for record in train(policy, data, settings, state=state):
            records.append(record)
            advance(int(record.step > settings.steps - config.steps))
            # The last state is what a later round goes on from, where it does.
            last = record.step == settings.steps and not config.redraw
            if last or record.step % config.checkpoint_steps == 0:
                with staged_checkpoint(place, ref.run_id, name, record.step) as staged:
                    save_state(state, staged)
                    (staged / RECORDS).write_text(json.dumps([asdict(record) for record in records]))
    return records, state.average


def _model_row(
    ref: ArtifactRef, config: RunConfig, settings: AlignmentSettings, natural: float | None
) -> dict[str, object]:
    return {
        "run_id": ref.run_id,
        "model_id": ref.key,
        "objective": settings.objective,
        "adapter": "lora" if config.alignment.lora_rank else "full",
        "seed": settings.seed,
        "steps": settings.steps,
        "beta": settings.beta,
        "natural_beta": natural,
    }


def _step_row(ref: ArtifactRef, round_index: int, record: StepRecord) -> dict[str, object]:
    # Wall time differs from run to run; it is in `timings`.
    row = as_row(ref.run_id, record, model_id=ref.key, round=round_index)
    del row["seconds"]
    return row
