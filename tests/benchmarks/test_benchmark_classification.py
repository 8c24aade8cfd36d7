"""Images a second: popalign's batches from a stored shard against one file at a time, and the same labels.

One file at a time is what the paper's code does with its classifier: open, preprocess with the library's transform, a
forward pass, for each image and each of the models. Both sides read lossless WebP and use the same weights. "both" is
what evaluated images go through: decoded once, seen by the builder's model and by the judge's. Either way is timed in
the same number format.

POPALIGN_BENCH_REPETITIONS: how often each is timed, in turn (5).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from popalign_core.attributes import AXES
from popalign_core.classification import AxisProbabilities, Status, attribute
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.checkpoints import resolve_source
from popalign_core.models.inference import Dtype
from popalign_core.models.sdxl import ModelSource, load_sdxl, pick_device
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, sample_images
from storage.images import decode_images, encode_image
from tasks.benchmarks import record_benchmark
from tasks.run import sampling_settings

pytestmark = pytest.mark.timeout(3600)

CONFIG = preset("emoji")
NAMES = CONFIG.expansion.axes
IMAGES = 256
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
# Of both classifiers together. The aim is 10, which float32 misses (docs/performance.md).
LEAST_RATIO: dict[Dtype, float] = {"float32": 7.0, "bfloat16": 10.0}
# Probabilities of the judge and features of the builder, to float32: batches and single images round otherwise.
TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.05}
# Labels and statuses that are others in bfloat16.
MOST_MOVED = 0.02
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
ROLES = ("builder", "judge", "both")


@dataclass(frozen=True)
class Measured:
    """seconds for IMAGES images by way (role, number format, and "single" for one file at a time), a value a
    repetition; found: the last features or probabilities. outcomes: by role and number format, an entry an axis."""

    seconds: dict[str, list[float]]
    found: dict[str, np.ndarray]
    outcomes: dict[str, list[AxisProbabilities]]
    device: str

    def labels(self, role: str, dtype: Dtype) -> list[tuple[str | None, Status]]:
        """Of every image on every axis, as a run would store them."""
        rows = [
            attribute(outcome, min_confidence=CONFIG.classification.min_confidence)
            for outcome in self.outcomes[f"{role}.{dtype}"]
        ]
        return [(row.label, row.status) for own in rows for row in own]

    def turns(self, *ways: str) -> list[float]:
        """Images a second of these one after another."""
        return [IMAGES / sum(parts) for parts in zip(*(self.seconds[way] for way in ways), strict=True)]


class Batched:
    """popalign's way."""

    def __init__(self, dtype: Dtype):
        self.seen = ZeroShotClassifier(CONFIG.classification.builder, dtype=dtype)
        self.heads = HeadClassifier(CONFIG.classification.judge, dtype=dtype)

    def builder(self, stored: list[bytes]) -> np.ndarray:
        return self._features(decode_images(stored))

    def judge(self, stored: list[bytes]) -> np.ndarray:
        return self._probabilities(decode_images(stored))

    def both(self, stored: list[bytes]) -> np.ndarray:
        images = decode_images(stored)
        return np.concatenate([self._features(images), self._probabilities(images)], axis=1)

    def _features(self, images: np.ndarray) -> np.ndarray:
        return self.seen.image_features(images).numpy()

    def _probabilities(self, images: np.ndarray) -> np.ndarray:
        found = self.heads.all_logits(NAMES, images)
        return np.concatenate([torch.from_numpy(one).softmax(dim=-1).numpy() for one in found], axis=1)


class OneFileAtATime:
    """The same weights through the libraries' own calls."""

    def __init__(self, device: torch.device, dtype: Dtype):
        self.device, self.dtype = device, getattr(torch, dtype)
        self.clip, _, self.transform = open_clip.create_model_and_transforms(
            f"local-dir:{resolve_source(CONFIG.classification.builder)}"
        )
        self.clip = self.clip.to(device, self.dtype).eval()
        folder = Path(resolve_source(CONFIG.classification.judge))
        self.heads = [
            (
                AutoModelForImageClassification.from_pretrained(folder / name, dtype=self.dtype).to(device).eval(),
                AutoImageProcessor.from_pretrained(folder / name),
            )
            for name in NAMES
        ]

    @torch.inference_mode()
    def builder(self, files: list[Path]) -> np.ndarray:
        rows = []
        for file in files:
            with Image.open(file) as image:
                pixels = self.transform(image.convert("RGB"))[None].to(self.device, self.dtype)
            rows.append(torch.nn.functional.normalize(self.clip.encode_image(pixels).float(), dim=-1).cpu())
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def judge(self, files: list[Path]) -> np.ndarray:
        rows = []
        for file in files:
            found = []
            for model, processor in self.heads:
                with Image.open(file) as image:
                    inputs = processor(image.convert("RGB"), return_tensors="pt").to(self.device, self.dtype)
                found.append(model(**inputs).logits.float().softmax(dim=-1).cpu())
            rows.append(torch.cat(found, dim=1))
        return torch.cat(rows).numpy()


def drawn_images() -> list[np.ndarray]:
    """Pictures of the embedded model, all different, so that labels near a border are among them."""
    model = load_sdxl(ModelSource(CONFIG.model))
    texts = [f"a photo of a {subject}" for subject in ("cook", "nurse", "farmer", "judge")]
    wanted = [ImageRequest(f"base/p/{i}", "p", texts[i % len(texts)], i, i) for i in range(IMAGES)]
    batches = sample_images(model, wanted, sampling_settings(CONFIG.sampling, CONFIG.acceleration))
    return [found.pixels for batch in batches for found in batch]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    stored = [encode_image(image) for image in drawn_images()]
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{position}.webp" for position in range(len(stored))]
    for file, data in zip(files, stored, strict=True):
        file.write_bytes(data)
    device = pick_device("auto")
    axes, images = [AXES[name] for name in NAMES], decode_images(stored)
    ways: dict[str, Callable[[], np.ndarray]] = {}
    outcomes: dict[str, list[AxisProbabilities]] = {}
    for dtype in DTYPES:
        many, single = Batched(dtype), OneFileAtATime(device, dtype)
        outcomes[f"builder.{dtype}"] = many.seen.probabilities(images, axes)
        outcomes[f"judge.{dtype}"] = many.heads.probabilities(images, axes)
        ways |= {f"{role}.{dtype}": partial(getattr(many, role), stored) for role in ROLES}
        ways |= {f"{role}.{dtype}.single": partial(getattr(single, role), files) for role in ("builder", "judge")}
    found = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPETITIONS):
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - started)
    return Measured(seconds, found, outcomes, device.type)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ["builder", "judge"])
def test_both_ways_say_the_same(measured: Measured, role: str, dtype: Dtype) -> None:
    batched, single = measured.found[f"{role}.{dtype}"], measured.found[f"{role}.float32.single"]
    assert batched.shape == single.shape
    assert np.abs(batched - single).max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_are_as_fast_as_aimed_at(measured: Measured, dtype: Dtype) -> None:
    ratios: dict[str, float | None] = {}
    for role in ROLES:
        peers = ("builder", "judge") if role == "both" else (role,)
        ratios[role] = record_benchmark(
            f"classification.{role}" if dtype == "float32" else f"classification.{role}_{dtype}",
            measured.turns(f"{role}.{dtype}"),
            "images/s",
            peer=measured.turns(*(f"{name}.{dtype}.single" for name in peers)),
            peer_name="one file at a time",
            device=measured.device,
            settings={"images": IMAGES, "threads": torch.get_num_threads(), "heads": len(NAMES), "dtype": dtype},
        )
    assert (ratios["both"] or 0.0) >= LEAST_RATIO[dtype]


def test_few_labels_move_in_16_bits(measured: Measured) -> None:
    moved: list[bool] = []
    for role in ("builder", "judge"):
        exact, short = measured.labels(role, "float32"), measured.labels(role, "bfloat16")
        moved += [first != second for first, second in zip(exact, short, strict=True)]
    record_benchmark(
        "classification.moved_in_bfloat16",
        [sum(moved) / len(moved)],
        "share of labels",
        device=measured.device,
        settings={"labels": len(moved), "min_confidence": CONFIG.classification.min_confidence},
    )
    assert sum(moved) / len(moved) <= MOST_MOVED
