"""Images a second: popalign's batches over prompts against a pipeline called once an image, and the same images.

Then each exact acceleration against sampling without it. What is compared is timed in turn, and the ratio is the median
of the turns: other work on the machine strikes both. Wall time, and CPU time, in which one thread's work is told apart
from waiting. POPALIGN_BENCH_REPETITIONS: how many turns (5). POPALIGN_BENCH_DTYPE: number format of both ways (the
preset's). POPALIGN_BENCH_COMPILE=1: compiled as well, minutes. POPALIGN_BENCH_JSON: a file for the numbers, which are
written to the terminal as well.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from popalign_core.acceleration import Acceleration
from popalign_core.models.checkpoints import resolve_source
from popalign_core.models.sdxl import DTYPES, SCHEDULERS, ModelSource, SdxlModel, load_sdxl
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from tasks.run import sampling_settings

pytestmark = pytest.mark.timeout(3600)

CONFIG = preset("emoji")
SETTINGS = replace(
    sampling_settings(CONFIG.sampling, CONFIG.acceleration),
    dtype=os.environ.get("POPALIGN_BENCH_DTYPE", CONFIG.sampling.dtype),
)
PLAIN = Acceleration(skip_empty_attention=False, channels_last="off")
SWITCHES: dict[str, dict[str, object]] = {
    "as the preset": {"acceleration": Acceleration()},
    "skip_empty_attention": {"acceleration": replace(PLAIN, skip_empty_attention=True)},
    "channels_last": {"acceleration": replace(PLAIN, channels_last="on")},
    "fused_projections": {"acceleration": replace(PLAIN, fused_projections=True)},
    "vae_batch 16": {"acceleration": replace(PLAIN, vae_batch=16)},
    "attention math": {"acceleration": PLAIN, "attention": "math"},
}
if os.environ.get("POPALIGN_BENCH_COMPILE"):
    SWITCHES |= {f"compile {mode}": {"acceleration": replace(PLAIN, compile=mode)} for mode in ("regional", "full")}
if torch.cuda.is_available():
    SWITCHES |= {"cuda_graphs": {"acceleration": replace(PLAIN, cuda_graphs=True)}}
SUBJECTS = ("cook", "farmer", "judge", "astronaut", "firefighter", "teacher", "scientist", "singer")
IMAGES = SETTINGS.batch_size
# One by one takes as long for each.
SINGLES = 8
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
LEAST_RATIO = 3.0
# Another batch size rounds otherwise.
TOLERANCE = 2
MOST_BEYOND_TOLERANCE = 0.01 if SETTINGS.dtype == "float32" else 0.1


@dataclass(frozen=True)
class Seconds:
    """wall, and CPU time of all threads."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Measured:
    """seconds for IMAGES batched and SINGLES single images, by repetition; images: uint8 (SINGLES, h, w, 3)."""

    batched: list[Seconds]
    single: list[Seconds]
    batched_images: np.ndarray
    single_images: np.ndarray
    device: str

    @property
    def ratios(self) -> list[float]:
        turns = zip(self.single, self.batched, strict=True)
        return [single.wall / SINGLES / (batched.wall / IMAGES) for single, batched in turns]

    @property
    def cpu_ratios(self) -> list[float]:
        turns = zip(self.single, self.batched, strict=True)
        return [single.cpu / SINGLES / (batched.cpu / IMAGES) for single, batched in turns]

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
            "dtype": SETTINGS.dtype,
            "load_average": os.getloadavg()[0],
            "batched_images_per_second": IMAGES / median(turn.wall for turn in self.batched),
            "single_images_per_second": SINGLES / median(turn.wall for turn in self.single),
            "ratios": self.ratios,
            "median_ratio": median(self.ratios),
            "median_ratio_of_cpu_time": median(self.cpu_ratios),
            "largest_difference": int(self.differences.max()),
            "share_that_differs": float((self.differences > 0).mean()),
            "share_beyond_tolerance": float((self.differences > TOLERANCE).mean()),
        }


def requests() -> list[ImageRequest]:
    texts = [CONFIG.expansion.prefix + "a " + SUBJECTS[number % len(SUBJECTS)] for number in range(IMAGES)]
    return [ImageRequest(f"base/{n}/0", f"p{n}", text, 0, 1000 + n) for n, text in enumerate(texts)]


def draw_batched(model: SdxlModel, wanted: list[ImageRequest], settings: SamplingSettings = SETTINGS) -> np.ndarray:
    return np.stack([image.pixels for batch in sample_images(model, wanted, settings) for image in batch])


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


def timed(draw: Callable[[], np.ndarray]) -> tuple[Seconds, np.ndarray]:
    wall, cpu = time.perf_counter(), time.process_time()
    images = draw()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), images


@pytest.fixture(scope="module")
def measured() -> Measured:
    model, wanted = load_sdxl(ModelSource(CONFIG.model), dtype=SETTINGS.dtype), requests()
    pipeline = single_pipeline(model.device)
    draw_batched(model, wanted[:1])
    draw_one_by_one(pipeline, wanted[:2])
    batched: list[tuple[Seconds, np.ndarray]] = []
    single: list[tuple[Seconds, np.ndarray]] = []
    for _ in range(REPETITIONS):
        batched.append(timed(lambda: draw_batched(model, wanted)))
        single.append(timed(lambda: draw_one_by_one(pipeline, wanted[:SINGLES])))
    seconds = [[duration for duration, _ in draws] for draws in (batched, single)]
    return Measured(seconds[0], seconds[1], batched[-1][1][:SINGLES], single[-1][1], model.device.type)


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


def test_batches_over_prompts_are_at_least_so_many_times_as_fast(measured: Measured) -> None:
    assert median(measured.ratios) >= LEAST_RATIO


def test_every_exact_acceleration_draws_the_same_images(capsys: pytest.CaptureFixture[str]) -> None:
    model, wanted = load_sdxl(ModelSource(CONFIG.model), dtype=SETTINGS.dtype), requests()
    plain = replace(SETTINGS, acceleration=PLAIN)
    expected = draw_batched(model, wanted, plain)
    for name, switches in SWITCHES.items():
        settings = replace(plain, **switches)
        found = draw_batched(model, wanted, settings)  # the first time compiles and records
        turns: list[tuple[Seconds, Seconds]] = []
        for _ in range(REPETITIONS):
            before = timed(partial(draw_batched, model, wanted, plain))[0]
            turns.append((before, timed(partial(draw_batched, model, wanted, settings))[0]))
        differences = np.abs(found.astype(int) - expected)
        line = {
            "acceleration": name,
            "median_ratio": round(median(before.wall / after.wall for before, after in turns), 3),
            "median_ratio_of_cpu_time": round(median(before.cpu / after.cpu for before, after in turns), 3),
            "largest_difference": int(differences.max()),
        }
        with capsys.disabled():
            sys.stdout.write(json.dumps(line) + "\n")
        assert (differences > TOLERANCE).mean() <= MOST_BEYOND_TOLERANCE
