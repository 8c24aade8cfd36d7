"""Shards that sleep instead of drawing: what the processes of the benchmark of orchestration do.

Importing it replaces the model and the sampler of `tasks.sampling` in this process. Whatever comes before and after the
sleep is the product's own: planning, claims, the task with its timeout, rows, commits, timings, progress, events.
`python sleeping_shards.py FORM WORKSPACE [PART PARTS]` does one thing; `sampling` is what workers run.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.logging import disable_run_logger
from prefect.workers.process import ProcessWorker

import tasks.progress as progress
import tasks.sampling as sampling_tasks
from flows.dispatch import GPU_DEPLOYMENT
from flows.placement import run_stage
from flows.pools import GPU_POOL
from flows.sampling import sampling
from popalign_core.config import RunConfig, with_settings
from popalign_core.execution import Execution
from popalign_core.models.sdxl import ModelSource
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SampledImage, SamplingSettings
from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.images import FORMAT, encode_image
from storage.layout import Workspace
from storage.tables import write_rows
from tasks.expansion import write_prompts
from tasks.run import record_run
from tasks.sampling import plan_shards, planned_requests, sampling_settings
from tasks.shards import claim_each, missing_samples

SHARDS = int(os.environ.get("POPALIGN_BENCH_SHARDS", "1000"))
SECONDS = float(os.environ.get("POPALIGN_BENCH_SECONDS", "0.02"))
# What SDXL draws for an evaluation is 10,000 images: 1,000 shards of 10.
IMAGES = int(os.environ.get("POPALIGN_BENCH_IMAGES", "10"))
RUN, MODEL, PURPOSE = "night", "base", "evaluation"
PROMPTS = 100
HERE = Path(__file__)


class SleepingModel:
    """Stands where the loaded pipeline would."""

    device = torch.device("cpu")

    def __init__(self, source: ModelSource, *_: object):
        self.source = source


def sleep_instead(
    _: SleepingModel, requests: Sequence[ImageRequest], settings: SamplingSettings
) -> Iterator[list[Any]]:
    """One batch of tiny pictures after the sleep; logs when it began and ended.

    By the host's monotonic clock and by this process's CPU time.
    """
    begin = time.monotonic(), time.process_time()
    time.sleep(SECONDS)
    end = time.monotonic(), time.process_time()
    log = Path(os.environ["POPALIGN_BENCH_LOG"]) / f"{os.getpid()}.jsonl"
    with log.open("a") as file:
        file.write(json.dumps([requests[0].sample_id, begin, end]) + "\n")
    size, nothing = settings.batch_size, torch.zeros(0)
    yield [SampledImage(r, np.full((8, 8, 3), r.seed % 256, np.uint8), size, nothing) for r in requests]


sampling_tasks.loaded_model = SleepingModel
sampling_tasks.sample_images = sleep_instead
sampling_tasks.provide_embeddings = lambda *_: None
sampling_tasks.fitting = lambda _workspace, _model, settings: settings
sampling_tasks.sampler_facts = lambda *_: {"sampler": "stub"}
# Shards of 10 s tell of their progress one by one.
progress.SECONDS_BETWEEN_UPDATES = 0.0


def run_configuration() -> RunConfig:
    """SDXL's preset, with as many images as SHARDS shards of IMAGES need."""
    each, rest = divmod(SHARDS * IMAGES, PROMPTS)
    assert not rest, f"{SHARDS} shards of {IMAGES} images are no whole number for each of {PROMPTS} prompts"
    changes = {"device": "cpu", "sampling.shard_size": str(IMAGES), "images.evaluation": str(each)}
    return with_settings(preset("sdxl"), changes)


def shards_of(workspace: str) -> list[ArtifactRef]:
    return plan_shards(workspace, RUN, run_configuration(), MODEL, PURPOSE)


def prepare(workspace: str, *_: int) -> None:
    """Commits configuration and prompts."""
    config = run_configuration()
    with disable_run_logger():
        record_run(workspace, RUN, "sdxl", config)
        write_prompts.fn(workspace, RUN, config.expansion)
    assert len(shards_of(workspace)) == SHARDS


def bare_work(workspace: str) -> Callable[[ArtifactRef], None]:
    """Gives what draws and commits one shard, with nothing around it: the peer."""
    config = run_configuration()
    requests = planned_requests(workspace, RUN, config, MODEL, PURPOSE)
    settings = sampling_settings(config.sampling, config.acceleration)
    model = SleepingModel(ModelSource(config.model))

    def work(ref: ArtifactRef) -> None:
        first = int(ref.key.rsplit(".", 1)[1]) * IMAGES
        (drawn,) = sleep_instead(model, requests[first : first + IMAGES], settings)
        stored = [encode_image(image.pixels) for image in drawn]
        samples = [row_of(image, data) for image, data in zip(drawn, stored, strict=True)]
        images = [
            {"sample_id": image.request.sample_id, "image": data, "format": FORMAT}
            for image, data in zip(drawn, stored, strict=True)
        ]
        with staged_artifact(ref) as folder:
            write_rows(folder, "samples", samples)
            write_rows(folder, "images", images)

    return work


def row_of(image: SampledImage, data: bytes) -> dict[str, object]:
    return {
        "run_id": RUN,
        "model_id": MODEL,
        "prompt_id": image.request.prompt_id,
        "sample_index": image.request.index,
        "sample_id": image.request.sample_id,
        "seed": image.request.seed,
        "width": 8,
        "height": 8,
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "sampler_fingerprint": "",
    }


def bare(workspace: str, part: int, parts: int) -> None:
    """A loop over every parts-th shard."""
    work = bare_work(workspace)
    for ref in shards_of(workspace)[part::parts]:
        work(ref)


def claims(workspace: str, *_: int) -> None:
    """The same loop, through claims; any number of processes may do this at once."""
    work = bare_work(workspace)
    for ref in claim_each(shards_of(workspace)):
        work(ref)


def stage(workspace: str, *_: int) -> None:
    """The stage in this process, as one flow run."""
    sampling(RUN, MODEL, PURPOSE, workspace, run_configuration(), Execution(shard_timeout_minutes=1))


@flow(name="ordering")
def ordering(workspace: str) -> None:
    """The stage as runs on all workers of the GPU pool, until nothing is missing."""
    config = run_configuration()
    run_stage(
        sampling,
        Execution(placement="workers", shard_timeout_minutes=1),
        lambda: missing_samples(workspace, RUN, config, MODEL, PURPOSE),
        "sampling",
        **{"run_id": RUN, "model_id": MODEL, "purpose": PURPOSE, "workspace": workspace, "config": config},
    )


def dispatched(workspace: str, *_: int) -> None:
    """What `ordering` is in a deployment, here in this process."""
    ordering(workspace)


def deploy(*_: object) -> None:
    """Makes the pool, and the deployment of this file's `sampling` in it."""
    template = ProcessWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=GPU_POOL, type="process", base_job_template=template))
    source = sampling.from_source(source=str(HERE.parent), entrypoint=f"{HERE.name}:sampling")
    source.deploy(GPU_DEPLOYMENT, work_pool_name=GPU_POOL, print_next_steps=False)


FORMS = {"prepare": prepare, "bare": bare, "claims": claims, "stage": stage, "dispatched": dispatched, "deploy": deploy}

if __name__ == "__main__":
    FORMS[sys.argv[1]](str(Workspace.open(sys.argv[2]).root), *map(int, sys.argv[3:]))
