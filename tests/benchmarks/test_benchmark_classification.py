"""Images a second: popalign's batches from a stored shard against one file at a time, and the same labels.

One file at a time is what the paper's code does with its classifier: open, preprocess with the library's transform, a
forward pass, for each image and each of the models. Both sides read lossless WebP and use the same weights.

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
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from popalign_core.attributes import AXES
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.checkpoints import resolve_source
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from storage.images import decode_images, encode_image

pytestmark = pytest.mark.timeout(3600)

CONFIG = preset("emoji")
NAMES = CONFIG.expansion.axes
IMAGES = 256
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
# The aim is 10. On a CPU the forward pass in batches costs 1/5.7 of what it costs alone (docs/method.md, section 9).
LEAST_RATIO = 4.0
# Probabilities: batches and single images round otherwise.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Measured:
    """seconds for IMAGES images by role and repetition, and the probabilities of the last."""

    batched: dict[str, list[float]]
    single: dict[str, list[float]]
    probabilities: dict[str, tuple[np.ndarray, np.ndarray]]
    device: str

    def ratios(self, role: str) -> list[float]:
        return [one / many for one, many in zip(self.single[role], self.batched[role], strict=True)]

    @property
    def both(self) -> list[float]:
        """Of builder and judge together."""
        sums = [map(sum, zip(*side.values(), strict=True)) for side in (self.single, self.batched)]
        return [one / many for one, many in zip(*sums, strict=True)]

    def numbers(self) -> dict[str, object]:
        found: dict[str, object] = {
            "device": self.device,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "images": IMAGES,
            "repetitions": REPETITIONS,
            "median_ratio": median(self.both),
            "ratios": self.both,
        }
        for role in self.batched:
            found[role] = {
                "batched_images_per_second": IMAGES / median(self.batched[role]),
                "single_images_per_second": IMAGES / median(self.single[role]),
                "median_ratio": median(self.ratios(role)),
            }
        return found


class OneFileAtATime:
    """The same weights through the libraries' own calls."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clip, _, self.transform = open_clip.create_model_and_transforms(
            f"local-dir:{resolve_source(CONFIG.classification.builder)}"
        )
        self.clip = self.clip.to(device).eval()
        folder = Path(resolve_source(CONFIG.classification.judge))
        self.heads = [
            (
                AutoModelForImageClassification.from_pretrained(folder / name, dtype=torch.float32).to(device).eval(),
                AutoImageProcessor.from_pretrained(folder / name),
            )
            for name in NAMES
        ]

    @torch.inference_mode()
    def builder(self, files: list[Path]) -> np.ndarray:
        rows = []
        for file in files:
            with Image.open(file) as image:
                pixels = self.transform(image.convert("RGB"))[None].to(self.device)
            rows.append(torch.nn.functional.normalize(self.clip.encode_image(pixels), dim=-1).cpu())
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def judge(self, files: list[Path]) -> np.ndarray:
        rows = []
        for file in files:
            found = []
            for model, processor in self.heads:
                with Image.open(file) as image:
                    inputs = processor(image.convert("RGB"), return_tensors="pt").to(self.device)
                found.append(model(**inputs).logits.softmax(dim=-1).cpu())
            rows.append(torch.cat(found, dim=1))
        return torch.cat(rows).numpy()


def drawn_images() -> list[np.ndarray]:
    """Pictures of the embedded model; each several times, since drawing them is not what is measured."""
    model = load_sdxl(ModelSource(CONFIG.model))
    settings = CONFIG.sampling.model_dump(exclude={"shard_size", "image_size"}) | {"steps": 4}
    wanted = [ImageRequest(f"base/p/{i}", "p", "a photo of a cook", i, i) for i in range(CONFIG.sampling.batch_size)]
    batches = sample_images(model, wanted, SamplingSettings(height=0, width=0, **settings))
    drawn = [found.pixels for batch in batches for found in batch]
    return (drawn * (IMAGES // len(drawn) + 1))[:IMAGES]


def timed(classify: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    found = classify()
    return time.perf_counter() - started, found


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    stored = [encode_image(image) for image in drawn_images()]
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{position}.webp" for position in range(len(stored))]
    for file, data in zip(files, stored, strict=True):
        file.write_bytes(data)
    builder = ZeroShotClassifier(CONFIG.classification.builder)
    judge = HeadClassifier(CONFIG.classification.judge)
    single = OneFileAtATime(judge.device)

    def many_by_judge(part: list[bytes]) -> np.ndarray:
        images = decode_images(part)
        found = judge.all_logits(NAMES, images)
        return np.concatenate([torch.from_numpy(one).softmax(dim=-1).numpy() for one in found], axis=1)

    ways = {
        "builder": (lambda part: builder.image_features(decode_images(part)).numpy(), single.builder),
        "judge": (many_by_judge, single.judge),
    }
    batched: dict[str, list[float]] = {role: [] for role in ways}
    one: dict[str, list[float]] = {role: [] for role in ways}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for many, single_file in ways.values():
        many(stored)
        single_file(files[:8])
    for _ in range(REPETITIONS):
        for role, (many, single_file) in ways.items():
            seconds, first = timed(lambda many=many: many(stored))
            batched[role].append(seconds)
            seconds, second = timed(lambda single_file=single_file: single_file(files))
            one[role].append(seconds)
            found[role] = (first, second)
    assert set(NAMES) <= set(AXES)
    return Measured(batched, one, found, judge.device.type)


def test_the_numbers_are_told(measured: Measured, capsys: pytest.CaptureFixture[str]) -> None:
    text = json.dumps(measured.numbers(), indent=1) + "\n"
    with capsys.disabled():
        sys.stdout.write(f"\n{text}")
    if path := os.environ.get("POPALIGN_BENCH_JSON"):
        Path(path).write_text(text)


@pytest.mark.parametrize("role", ["builder", "judge"])
def test_both_ways_say_the_same(measured: Measured, role: str) -> None:
    batched, single = measured.probabilities[role]
    assert batched.shape == single.shape
    assert np.abs(batched - single).max() <= TOLERANCE


def test_batches_are_at_least_four_times_as_fast(measured: Measured) -> None:
    assert median(measured.both) >= LEAST_RATIO
