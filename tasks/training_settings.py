"""What fixes one training: its settings from the configuration, and its row of `models`."""

from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.objective import nats_per_unit_error, natural_beta
from popalign_core.alignment.policy_gradient import RewardData
from popalign_core.alignment.reward import RewardSettings
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.config import RunConfig
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.models.trainable import noise_schedule
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef
from tasks.changed_settings import recorded_config
from tasks.registry import lineage
from tasks.training_order import RoundOrder, trained_model
from tasks.training_processes import Report


def alignment_settings(run: RunConfig, round_index: int, seed_index: int = 0) -> AlignmentSettings:
    """The stage's part of the configuration as plain values.

    Without `redraw` all rounds are one training, which the later ones take further.
    """
    names = "objective pairs_per_step learning_rate_schedule first_timestep beta anchor_weight preserve_weight "
    names += "winner_preserving ema_decay caption_dropout caption_mixing mixed_precision optimizer spike_limit "
    names += "warmup_steps max_gradient_norm weight_decay timestep_sampling"
    config, reward = run.alignment, None
    values = config.model_dump(include=set(names.split()))
    if config.objective == "reward":
        chain_steps, guidance_scale = run.sampling.steps, run.sampling.guidance_scale
        reward = RewardSettings(**run.reward.model_dump(), chain_steps=chain_steps, guidance_scale=guidance_scale)
    first, rounds = (round_index, 1) if config.redraw else (1, round_index)
    repeated = ("seed", seed_index) if seed_index else ()
    return AlignmentSettings(
        **values,
        learning_rate=config.learning_rate * (config.round_decay ** (round_index - 1) if config.redraw else 1),
        steps=rounds * config.steps,
        schedule_steps=config.steps if config.redraw else config.rounds * config.steps,
        seed=derive_seed(run.seed, "alignment", first, *repeated),
        micro_batch=config.micro_batch or None,
        reward=reward,
    )


def described_model(
    order: RoundOrder,
    model: TextToImageModel,
    data: AlignmentData | RewardData,
    settings: AlignmentSettings,
    report: Report,
) -> dict[str, object]:
    """The round's row of `models`."""
    natural = None
    if isinstance(data, AlignmentData):
        schedule = noise_schedule(model, order.config.sampling.image_size)
        nats = nats_per_unit_error(schedule, data.latent_elements, settings.first_timestep)
        natural = natural_beta(settings.beta, nats, settings.objective, data.pairs_each)
    report.say(f"beta {settings.beta:g} is {natural} in units of log-likelihood")
    row = _model_row(order.ref, order.config, settings, natural)
    repeats = trained_model(order.round_index) if order.seed_index else None
    return row | {"parent_model_id": order.parent_id, "round": order.round_index, "repeats_model_id": repeats}


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
        **lineage(ref, recorded_config(ref.workspace, ref.run_id, config)),
    }
