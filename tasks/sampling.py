"""One shard of images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from math import ceil, prod

from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.expansion import Prompt
from popalign_core.sample_sets import image_requests, slices
from popalign_core.sampler_facts import sampler_facts
from popalign_core.sampling import ImageRequest, SampledImage, sample_images
from popalign_core.seeds import sample_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks.batch_sizes import fitting, keeping_batch_size
from tasks.embeddings import provide_embeddings
from tasks.events import announce_commit
from tasks.progress import progress_of
from tasks.run import drawing_source, loaded_model, passes, read_prompts, reference, sampling_settings, timed
from tasks.samplers import record_sampler
from tasks.shard_writing import shard_writer

# Held-out neutral prompts: the images that disparities are reported of.
EVALUATION = "evaluation"


def planned_requests(
    workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str
) -> tuple[ImageRequest, ...]:
    """What a purpose ("evaluation", "round-2", "counterfactual-2", ...) draws, in the order that shards cut."""
    root = str(Workspace.open(workspace).root)
    return _planned(root, run_id, config, model_id, purpose)  # pyright: ignore[reportArgumentType] - frozen, so hashable


# Every shard asks for the whole plan, and what the plan is made of never changes once it is committed.
@lru_cache(maxsize=2)
def _planned(workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str) -> tuple[ImageRequest, ...]:
    name, _, round_index = purpose.partition("-")
    prompts = read_prompts(workspace, run_id)
    if name == "counterfactual":
        planned = reference(workspace, run_id, "counterfactuals", f"round-{round_index}")
        return tuple(_counterfactual_requests(planned, prompts, config.seed))
    return tuple(
        image_requests(
            prompts,
            slices(name, config.images, int(round_index or 1)),
            model_id=model_id,
            run_seed=config.seed,
            cells=prod(len(AXES[axis].groups) for axis in config.expansion.axes),
        )
    )


def _counterfactual_requests(planned: ArtifactRef, prompts: Sequence[Prompt], run_seed: int) -> list[ImageRequest]:
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    return [
        ImageRequest(
            sample_id=row["sample_id"],
            prompt_id=row["target_prompt_id"],
            text=by_id[row["target_prompt_id"]].text,
            index=row["sample_index"],
            seed=sample_seed(run_seed, by_id[row["target_prompt_id"]].family_id, row["sample_index"]),
        )
        for row in read_artifact(planned, "counterfactuals")
    ]


def extended(workspace: str, run_id: str, config: RunConfig) -> list[str]:
    """Purposes by which the evaluation was extended, "evaluation-2" first; see `tasks.precision`."""
    found: list[str] = []
    while config.assessment.precision:
        following = f"{EVALUATION}-{len(found) + 2}"
        if not is_committed(reference(workspace, run_id, "extensions", following)):
            break
        found.append(following)
    return found


def asked_for(purpose: str) -> str:
    """The purpose that a shard's images were asked for by: an extended evaluation is one."""
    return EVALUATION if purpose.partition("-")[0] == EVALUATION else purpose


def plan_shards(workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str) -> list[ArtifactRef]:
    """References of all shards of a purpose ("evaluation", "round-2", ...), committed or not, extensions among them."""
    more = extended(workspace, run_id, config) if purpose == EVALUATION else []
    return [shard for part in (purpose, *more) for shard in _shards_of(workspace, run_id, config, model_id, part)]


def _shards_of(workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str) -> list[ArtifactRef]:
    count = ceil(len(planned_requests(workspace, run_id, config, model_id, purpose)) / config.sampling.shard_size)
    return [reference(workspace, run_id, "samples", f"{model_id}.{purpose}.{shard:05d}") for shard in range(count)]


def images_missing(shards: Sequence[ArtifactRef], config: RunConfig) -> int:
    """How many images of these shards are not committed yet."""
    missing = 0
    for shard in shards:
        if not is_committed(shard):
            model_id, purpose, number = shard.key.rsplit(".", 2)
            total = len(planned_requests(shard.workspace, shard.run_id, config, model_id, purpose))
            missing += min(config.sampling.shard_size, total - int(number) * config.sampling.shard_size)
    return missing


@task(
    cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 60], retry_jitter_factor=0.5, retry_condition_fn=passes
)
def sample_shard(ref: ArtifactRef, config: RunConfig) -> ArtifactRef:
    """Draws one shard and commits `samples` and `images`."""
    if is_committed(ref):
        return ref
    model_id, purpose, shard = ref.key.rsplit(".", 2)
    size = config.sampling.shard_size
    requests = planned_requests(ref.workspace, ref.run_id, config, model_id, purpose)
    requests = requests[int(shard) * size : (int(shard) + 1) * size]
    source = drawing_source(ref.workspace, ref.run_id, config, model_id)
    model = loaded_model(source, config.device, config.sampling.dtype, config.acceleration.vae_dtype)
    provide_embeddings(ref.workspace, model, [request.text for request in requests])
    settings = fitting(ref.workspace, model, sampling_settings(config.sampling, config.acceleration))

    @cache
    def fingerprint_of(batch_size: int, vae_batch: int) -> str:
        used = replace(settings, batch_size=batch_size).decoding(vae_batch)
        return record_sampler(ref.workspace, ref.run_id, sampler_facts(model, used))

    samples: list[dict[str, object]] = []
    with (
        timed(ref, "sampling", model.device.type) as facts,
        progress_of(f"sampling {model_id} {asked_for(purpose)}") as advance,
        staged_artifact(ref) as folder,
    ):
        threads, keep_latents = config.acceleration.encoding_threads, config.sampling.keep_latents
        with shard_writer(folder, threads, keep_latents=keep_latents) as writer:
            batches = sample_images(model, requests, settings)
            for batch in keeping_batch_size(ref.workspace, model, settings, batches):
                writer.add(batch)
                name = fingerprint_of(batch[0].batch_size, batch[0].vae_batch)
                samples += [_sample_row(ref.run_id, drawn, name) for drawn in batch]
                advance(len(batch))
        for row in samples:
            row["image_sha256"] = writer.hashes[str(row["sample_id"])]
        facts["items"] = len(samples)
        write_rows(folder, "samples", [{"model_id": model_id, **row} for row in samples])
    announce_commit(ref, len(samples))
    return ref


def _sample_row(run_id: str, drawn: SampledImage, fingerprint: str) -> dict[str, object]:
    request = drawn.request
    return {
        "run_id": run_id,
        "prompt_id": request.prompt_id,
        "sample_index": request.index,
        "sample_id": request.sample_id,
        "seed": request.seed,
        "width": drawn.pixels.shape[1],
        "height": drawn.pixels.shape[0],
        "sampler_fingerprint": fingerprint,
    }
