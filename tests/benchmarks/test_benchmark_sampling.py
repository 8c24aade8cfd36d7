"""Images a second: popalign's batches over prompts against a pipeline called once an image, and the same images.

POPALIGN_BENCH_REPETITIONS: how often each is timed, in turn (5). POPALIGN_BENCH_JSON: a file for the numbers, which are
written to the terminal as well.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from popalign_core.models.checkpoints import resolve_source
from popalign_core.models.sdxl import DTYPES, SCHEDULERS, ModelSource, SdxlModel, load_sdxl
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images

pytestmark = pytest.mark.timeout(3600)

CONFIG = preset("emoji")
SETTINGS = SamplingSettings(
    height=0, width=0, **CONFIG.sampling.model_dump(exclude={"shard_size", "image_size", "approximate"})
)
SUBJECTS = ("cook", "farmer", "judge", "astronaut", "firefighter", "teacher", "scientist", "singer")
IMAGES = SETTINGS.batch_size
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
LEAST_RATIO = 3.0
# Another batch size rounds otherwise.
TOLERANCE = 2
MOST_BEYOND_TOLERANCE = 0.01


@dataclass(frozen=True)
class Measured:
    """seconds for IMAGES images, by repetition; images: uint8 (IMAGES, h, w, 3)."""

    batched: list[float]
    single: list[float]
    batched_images: np.ndarray
    single_images: np.ndarray
    device: str

    @property
    def ratios(self) -> list[float]:
        return [single / batched for single, batched in zip(self.single, self.batched, strict=True)]

    @property
    def differences(self) -> np.ndarray:
        return np.abs(self.batched_images.astype(int) - self.single_images)

    def numbers(self) -> dict[str, object]:
        return {
            "device": self.device,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "scheduler": SETTINGS.scheduler,
            "steps": SETTINGS.steps,
            "guidance_scale": SETTINGS.guidance_scale,
            "batch_size": SETTINGS.batch_size,
            "images": IMAGES,
            "repetitions": REPETITIONS,
            "batched_images_per_second": IMAGES / median(self.batched),
            "single_images_per_second": IMAGES / median(self.single),
            "ratios": self.ratios,
            "median_ratio": median(self.ratios),
            "largest_difference": int(self.differences.max()),
            "share_that_differs": float((self.differences > 0).mean()),
            "share_beyond_tolerance": float((self.differences > TOLERANCE).mean()),
        }


def requests() -> list[ImageRequest]:
    texts = [CONFIG.expansion.prefix + "a " + SUBJECTS[number % len(SUBJECTS)] for number in range(IMAGES)]
    return [ImageRequest(f"base/{n}/0", f"p{n}", text, 0, 1000 + n) for n, text in enumerate(texts)]


def draw_batched(model: SdxlModel, wanted: list[ImageRequest]) -> np.ndarray:
    return np.stack([image.pixels for batch in sample_images(model, wanted, SETTINGS) for image in batch])


def single_pipeline(device: torch.device) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        resolve_source(CONFIG.model), dtype=DTYPES[SETTINGS.dtype], use_safetensors=True, add_watermarker=False
    )
    pipeline.scheduler = SCHEDULERS[SETTINGS.scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def draw_one_by_one(pipeline: StableDiffusionXLPipeline, wanted: list[ImageRequest]) -> np.ndarray:
    """As the paper's code does: a call an image, which encodes its prompt again."""
    images = [
        pipeline(
            prompt=request.text,
            num_inference_steps=SETTINGS.steps,
            guidance_scale=SETTINGS.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(request.seed),
        ).images[0]
        for request in wanted
    ]
    return np.stack([np.asarray(image) for image in images])


def timed(draw: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    images = draw()
    return time.perf_counter() - started, images


@pytest.fixture(scope="module")
def measured() -> Measured:
    model, wanted = load_sdxl(ModelSource(CONFIG.model), dtype=SETTINGS.dtype), requests()
    pipeline = single_pipeline(model.device)
    draw_batched(model, wanted[:1])
    draw_one_by_one(pipeline, wanted[:2])
    batched: list[tuple[float, np.ndarray]] = []
    single: list[tuple[float, np.ndarray]] = []
    for _ in range(REPETITIONS):
        batched.append(timed(lambda: draw_batched(model, wanted)))
        single.append(timed(lambda: draw_one_by_one(pipeline, wanted)))
    seconds = [[duration for duration, _ in draws] for draws in (batched, single)]
    return Measured(seconds[0], seconds[1], batched[-1][1], single[-1][1], model.device.type)


def test_the_numbers_are_told(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(measured.numbers(), indent=1) + "\n"
    with capsys.disabled():
        sys.stdout.write(f"\n{text}")
    if path := os.environ.get("POPALIGN_BENCH_JSON"):
        Path(path).write_text(text)


def test_both_ways_draw_the_same_images(measured: Measured) -> None:
    assert measured.batched_images.shape == measured.single_images.shape
    assert measured.batched_images.std() > 10
    assert (measured.differences > TOLERANCE).mean() <= MOST_BEYOND_TOLERANCE


def test_batches_over_prompts_are_at_least_three_times_as_fast(measured: Measured) -> None:
    assert median(measured.ratios) >= LEAST_RATIO
