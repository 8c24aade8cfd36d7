"""One round of fine-tuning."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from popalign_core.alignment.adapters import Policy, substituted_weights
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import TrainingState
from popalign_core.alignment.policy_gradient import RewardData, train_on_reward
from popalign_core.alignment.processes import Processes
from popalign_core.alignment.trainer import START_ROUNDING, StepRecord, train
from popalign_core.config import RunConfig
from popalign_core.errors import InvalidInput, TrainingDiverged
from popalign_core.models.attention import attention_backend
from popalign_core.models.loading import load_model
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.models.trainable import PassOptions, make_policy, own_graphs, save_weights, whole_network
from storage.artifacts import ArtifactRef, is_committed
from storage.checkpoints import remove_checkpoints
from storage.commit import staged_artifact
from storage.errors import NotCommitted
from storage.tables import write_rows
from tasks.alignment_data import alignment_data, data_kind, encode_share
from tasks.changed_settings import changed_settings
from tasks.memory import peak_bytes, reset_peak
from tasks.progress import progress_of
from tasks.reward_data import reward_data
from tasks.run import as_row, loaded_model, model_source, passes, timed
from tasks.training_checkpoints import RoundCheckpoints, last_state
from tasks.training_errors import same_outcome
from tasks.training_order import WHOLE_TRAINING as WHOLE_TRAINING
from tasks.training_order import RoundOrder, require_same_start
from tasks.training_processes import ONE, Report, TrainingProcesses, run_processes
from tasks.training_settings import alignment_settings, described_model

if TYPE_CHECKING:
    from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

# A network disk shows another host's files a while later.
SECONDS_UNTIL_SEEN = 120


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=passes)
def align_round(
    preferences: ArtifactRef,
    config: RunConfig,
    parent_id: str,
    round_index: int,
    processes: TrainingProcesses = ONE,
    seed_index: int = 0,
) -> ArtifactRef:
    """Trains from the parent model on a round's preferences; commits weights, `models` and `training_steps`.

    seed_index: other than 0, the round again with another training seed.
    preferences: the run's prompts instead, where the objective is `reward`, which draws its own images.

    A number that is none stops the training and commits nothing. processes: other than ONE, they are started here and
    end with this one; on several hosts the same call is made on each, and returns on all once the round is committed.
    Raises: LostProcess where one of several is gone; what was checkpointed is kept.
    """
    order = RoundOrder(preferences, config, parent_id, round_index, seed_index)
    if config.alignment.objective == "reward" and processes.world > 1:
        raise InvalidInput("the objective reward trains in one process: set training processes and hosts to 1.")
    if not is_committed(order.ref):
        loaded_model.cache_clear()  # the sampler makes room for policy and reference
        with progress_of(f"alignment {order.ref.key}") as advance:
            report = Report(advance, get_run_logger().info)
            if processes.world == 1:
                train_round(order, report)
            else:
                _train_in_processes(order, processes, report)
    if config.alignment.redraw or seed_index:  # a crash may have come between the commit and this
        remove_checkpoints(*order.checkpoints)
    return order.ref


def _train_in_processes(order: RoundOrder, processes: TrainingProcesses, report: Report) -> None:
    name = f"{order.ref.run_id}.{order.ref.key}"
    run_processes("tasks.training_rank", order.to_json(), name, processes, report)
    deadline = time.monotonic() + SECONDS_UNTIL_SEEN
    while not is_committed(order.ref):
        if time.monotonic() > deadline:
            raise NotCommitted(
                f"the training ended, and its model is not in {order.ref.folder}: all hosts need one workspace."
            )
        time.sleep(1)


def train_round(order: RoundOrder, report: Report, accelerator: "Accelerator | None" = None, device: str = "") -> None:
    """Trains and commits a round, in each of its processes at once; the first one writes.

    accelerator: of several processes. device: instead of the configuration's.
    """
    ref, processes = order.ref, Processes(accelerator)
    with same_outcome(processes):
        model, earlier_lora = _load_model(order, device)
    with _timing(ref, model.device.type, processes) as facts:
        reset_peak(model.device)
        _encode_together(order, model, processes)
        with same_outcome(processes):
            data = _training_data(order, model)
            kind = "none" if isinstance(data, RewardData) else data_kind(data)
            report.say(f"latents of the training data: {kind}")
            settings = alignment_settings(order.config, order.round_index, order.seed_index)
            row = described_model(order, model, data, settings, report)
            policy = _policy(order.config, model, settings.seed, earlier_lora, processes)
            state, records = last_state(policy, settings, order.checkpoints)
        require_same_start(processes, order, state.step)
        if isinstance(data, RewardData):
            steps = train_on_reward(policy, data, settings, state=state)
        else:
            steps = train(policy, data, settings, state=state, accelerator=accelerator)
        with own_graphs(order.config.alignment.compiled), attention_backend(order.config.sampling.attention):
            records = _followed(steps, order, state, records, processes, report)[-order.config.alignment.steps :]
        facts |= {"items": len(records), "peak_bytes": peak_bytes(model.device)}
        with _kept_weights(state):
            network = whole_network(policy, keep=processes.is_first)
            with same_outcome(processes):
                if processes.is_first:
                    made = {"latents": kind, "attention": order.config.sampling.attention}
                    made |= _facts_of_processes(processes) | _facts_of_changes(order)
                    _commit(order, (policy, network), row, records, made)


def _load_model(order: RoundOrder, device: str) -> tuple[TextToImageModel, Path | None]:
    """The parent model without an adapter of its own, and the folder of that adapter."""
    config, ref = order.config, order.ref
    source = model_source(ref.workspace, ref.run_id, config, order.parent_id)
    # A fresh load: training changes the weights in place, and the cached model must stay what its source names.
    # Full fine-tuning needs float32 master weights.
    dtype = config.sampling.dtype if config.alignment.lora_rank else "float32"
    earlier = None if source.lora is None else Path(source.lora)
    return load_model(replace(source, lora=None), device=device or config.device, dtype=dtype), earlier


def _training_data(order: RoundOrder, model: TextToImageModel) -> AlignmentData | RewardData:
    if order.config.alignment.objective == "reward":
        return reward_data(order, model)
    named, kept = order.config.alignment.preserve_weight > 0, order.config.sampling.keep_latents
    settings = alignment_settings(order.config, order.round_index, order.seed_index)
    return alignment_data(order.preferences, model, named=named, kept_latents=kept, settings=settings)


def _encode_together(order: RoundOrder, model: TextToImageModel, processes: Processes) -> None:
    """Each of several processes encodes a part of the images, which all of them read."""
    if processes.share.processes == 1:
        return
    settings = alignment_settings(order.config, order.round_index, order.seed_index)
    with same_outcome(processes):
        kept = order.config.sampling.keep_latents
        encode_share(order.preferences, model, settings, processes.share, kept_latents=kept)


def _timing(ref: ArtifactRef, device: str, processes: Processes) -> AbstractContextManager[dict[str, int | None]]:
    if not processes.is_first:
        return nullcontext({"items": 0})
    world = processes.share.processes
    return timed(ref, "alignment", device if world == 1 else f"{world} x {device}")


def _policy(
    config: RunConfig, model: TextToImageModel, seed: int, earlier_lora: Path | None, processes: Processes
) -> Policy:
    alignment = config.alignment
    return make_policy(
        model,
        lora_rank=alignment.lora_rank,
        trainable=alignment.trainable,
        seed=seed,
        earlier_lora=earlier_lora,
        passes=PassOptions(
            alignment.gradient_checkpointing,
            alignment.mixed_precision,
            alignment.compiled,
            alignment.sharded and processes.share.processes > 1,
        ),
        image_size=config.sampling.image_size,
    )


def _followed(
    steps: Iterator[StepRecord],
    order: RoundOrder,
    state: TrainingState,
    records: list[StepRecord],
    processes: Processes,
    report: Report,
) -> list[StepRecord]:
    """Takes the steps to the end, and saves a checkpoint now and then; the records of all steps.

    Raises: TrainingDiverged, in all processes at the same step, with the checkpoint that is kept in its message.
    """
    config, settings = order.config.alignment, state.settings
    report.advance(max(0, state.step - (settings.steps - config.steps)))

    checkpoints = RoundCheckpoints(order.checkpoints, processes, state.step)
    try:
        for record in steps:
            records.append(record)
            checkpoints.step_was_sound()
            report.advance(int(record.step > settings.steps - config.steps))
            if state.start_gap is not None and record.step == 1:
                _tell_start(state.start_gap, report)
            # The last state is what a later round goes on from, where it does.
            last = record.step == settings.steps and not config.redraw
            if last or record.step % config.checkpoint_steps == 0:
                checkpoints.save(state, records)
    except TrainingDiverged as error:
        raise checkpoints.after(error, state) from error
    checkpoints.step_was_sound()  # as far as can be told: its model is committed
    return records


def _tell_start(gap: float, report: Report) -> None:
    if gap > START_ROUNDING:
        report.say(
            f"WARNING: training begins at the reference, and beta times g is up to {gap:.2g} there, not 0: the two are "
            "computed with different rounding, and the loss is not that of the objective. Turn alignment.compiled or "
            "alignment.mixed_precision off, or choose sampling.dtype=float32 for a LoRA."
        )


def _facts_of_processes(processes: Processes) -> dict[str, object]:
    world = processes.share.processes
    return {} if world == 1 else {"training_processes": world}


def _facts_of_changes(order: RoundOrder) -> dict[str, object]:
    changed = changed_settings(order.ref.workspace, order.ref.run_id, order.config)
    return {"changed_settings": changed} if changed else {}


def _kept_weights(state: TrainingState) -> AbstractContextManager[None]:
    """Inside, the policy has the weights that are kept: the average, if there is one."""
    return nullcontext() if state.average is None else substituted_weights(state.policy.denoiser, state.average)


def _commit(
    order: RoundOrder,
    trained: tuple[Policy, Any],
    row: dict[str, object],
    records: list[StepRecord],
    facts: dict[str, object],
) -> None:
    """trained: the policy, and its whole network."""
    ref, (policy, network) = order.ref, trained
    with staged_artifact(ref, facts) as folder:
        save_weights(policy, folder, lora=bool(order.config.alignment.lora_rank), network=network)
        write_rows(folder, "models", [row])
        write_rows(folder, "training_steps", [_step_row(ref, order.round_index, record) for record in records])


def _step_row(ref: ArtifactRef, round_index: int, record: StepRecord) -> dict[str, object]:
    # Wall time differs from run to run; it is in `timings`.
    row = as_row(ref.run_id, record, model_id=ref.key, round=round_index)
    del row["seconds"]
    return row
