"""One shard of images."""

import hashlib
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
from popalign_core.sampling import ImageRequest, SampledImage, sample_images, sampler_fingerprint
from popalign_core.seeds import sample_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import read_artifact, write_rows
from tasks.events import announce_commit
from tasks.progress import progress_of
from tasks.run import drawing_source, loaded_model, passes, read_prompts, reference, sampling_settings, timed


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


def plan_shards(workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str) -> list[ArtifactRef]:
    """References of all shards of a purpose ("evaluation", "round-2", ...), committed or not."""
    count = ceil(len(planned_requests(workspace, run_id, config, model_id, purpose)) / config.sampling.shard_size)
    return [reference(workspace, run_id, "samples", f"{model_id}.{purpose}.{shard:05d}") for shard in range(count)]


def images_missing(shards: Sequence[ArtifactRef], config: RunConfig) -> int:
    """How many images of these shards of one purpose are not committed yet."""
    if not shards:
        return 0
    first = shards[0]
    model_id, purpose, _ = first.key.rsplit(".", 2)
    total = len(planned_requests(first.workspace, first.run_id, config, model_id, purpose))
    size = config.sampling.shard_size
    sizes = [min(size, total - number * size) for number in range(len(shards))]
    return sum(count for count, shard in zip(sizes, shards, strict=True) if not is_committed(shard))


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
    model = loaded_model(source, config.device, config.sampling.dtype)
    settings = sampling_settings(config.sampling)

    @cache
    def fingerprint_of(batch_size: int) -> str:
        return sampler_fingerprint(model, replace(settings, batch_size=batch_size))

    samples, images = [], []
    with timed(ref, "sampling", model.device.type) as facts, progress_of(f"sampling {model_id} {purpose}") as advance:
        for batch in sample_images(model, requests, settings):
            for drawn in batch:
                data = encode_image(drawn.pixels)
                images.append({"sample_id": drawn.request.sample_id, "image": data, "format": FORMAT})
                samples.append(_sample_row(ref.run_id, model_id, drawn, data, fingerprint_of(drawn.batch_size)))
            advance(len(batch))
        facts["items"] = len(samples)
        with staged_artifact(ref) as folder:
            write_rows(folder, "samples", samples)
            write_rows(folder, "images", images)
    announce_commit(ref, len(samples))
    return ref


def _sample_row(run_id: str, model_id: str, drawn: SampledImage, data: bytes, fingerprint: str) -> dict[str, object]:
    request = drawn.request
    return {
        "run_id": run_id,
        "model_id": model_id,
        "prompt_id": request.prompt_id,
        "sample_index": request.index,
        "sample_id": request.sample_id,
        "seed": request.seed,
        "width": drawn.pixels.shape[1],
        "height": drawn.pixels.shape[0],
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "sampler_fingerprint": fingerprint,
    }
