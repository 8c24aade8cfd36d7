"""Seconds a training step and peak memory, by what is trained and by objective; and what the caches save.

The peer is the same step with latents and embeddings computed again in it, as the paper's code computes its text
embeddings. POPALIGN_BENCH_REPETITIONS: steps timed each way, in turn (5). POPALIGN_BENCH_JSON: a file for the numbers.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import torch

from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.checkpoint import begin
from popalign_core.alignment.settings import AlignmentSettings, Objective
from popalign_core.alignment.trainer import train
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.models.trainable import make_policy
from popalign_core.presets import preset

pytestmark = pytest.mark.timeout(3600)

CONFIG = preset("emoji")
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
PAIRS = CONFIG.alignment.pairs_per_step
PARTS: dict[str, dict[str, Any]] = {
    "all of the UNet": {"lora_rank": 0, "trainable": "all"},
    "conditioning": {"lora_rank": 0, "trainable": "conditioning"},
    "LoRA, rank 16": {"lora_rank": 16, "trainable": "all"},
}
CAPTIONS = [f"a photo of a {subject}" for subject in ("cook", "farmer", "judge", "teacher", "pilot", "singer")]
NUMBERS: dict[str, Any] = {"pairs_a_step": PAIRS, "threads": torch.get_num_threads(), "torch": torch.__version__}


def pixels() -> torch.Tensor:
    return torch.rand(2 * PAIRS, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def data_of(model: SdxlModel) -> AlignmentData:
    """Pairs of noise, with everything that a run caches computed here."""
    mean, deviation = model.encode_images(pixels())
    captions = [f"a photo of a woman {text.split()[-1]}" for text in CAPTIONS]
    place = torch.arange(PAIRS) % len(CAPTIONS)
    return AlignmentData(
        latent_means=mean,
        latent_deviations=deviation,
        winner=torch.arange(PAIRS),
        loser=PAIRS + torch.arange(PAIRS),
        caption=place,
        weight=torch.ones(PAIRS),
        population=place,
        winner_caption=place + len(CAPTIONS),
        **model.encode_captions([*CAPTIONS, *captions]),
    )


def settings_of(**changes: Any) -> AlignmentSettings:
    values: dict[str, Any] = CONFIG.alignment.model_dump(include={"beta", "preserve_weight", "first_timestep"})
    values |= {"steps": REPETITIONS + 1, "pairs_per_step": PAIRS, "learning_rate": 1e-5}
    return AlignmentSettings(**(values | changes))


def steps_of(part: str, **changes: Any) -> list[float]:
    """Seconds of every step but the first."""
    model = load_sdxl(ModelSource(CONFIG.model), dtype="float32")
    policy, data = make_policy(model, seed=0, **PARTS[part]), data_of(model)
    return [record.seconds for record in train(policy, data, settings_of(**changes))][1:]


def test_seconds_by_part_and_objective_are_told() -> None:
    NUMBERS["seconds_a_step_by_part"] = {part: median(steps_of(part)) for part in PARTS}
    NUMBERS["seconds_a_step_by_objective"] = {
        name: median(steps_of("conditioning", objective=name)) for name in get_args(Objective)
    }
    assert all(seconds > 0 for seconds in NUMBERS["seconds_a_step_by_objective"].values())


def test_caches_save_time() -> None:
    model = load_sdxl(ModelSource(CONFIG.model), dtype="float32")
    policy, images = make_policy(model, seed=0, **PARTS["conditioning"]), pixels()
    data, settings = data_of(model), settings_of()
    state = begin(policy, settings)
    cached: list[float] = []
    recomputed: list[float] = []
    for record in train(policy, data, settings, state=state):
        started = time.perf_counter()
        model.encode_images(images)
        model.encode_prompts([CAPTIONS[row % len(CAPTIONS)] + "," * (row // len(CAPTIONS)) for row in range(PAIRS)])
        cached.append(record.seconds)
        recomputed.append(record.seconds + time.perf_counter() - started)
    ratios = [peer / own for peer, own in zip(recomputed[1:], cached[1:], strict=True)]
    NUMBERS["recomputed_to_cached"] = {"ratios": ratios, "median": median(ratios)}
    assert median(ratios) > 1


@pytest.mark.parametrize("part", PARTS)
def test_peak_memory_is_told(part: str) -> None:
    """In a process of its own: the peak of a process never falls."""
    run = subprocess.run([sys.executable, __file__, part], check=True, capture_output=True, text=True)
    NUMBERS.setdefault("peak_mib", {})[part] = json.loads(run.stdout.splitlines()[-1])
    assert NUMBERS["peak_mib"][part] > 0


def test_the_numbers_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    NUMBERS["settings"] = asdict(settings_of())
    text = json.dumps(NUMBERS, indent=1) + "\n"
    with capsys.disabled():
        sys.stdout.write(f"\n{text}")
    if path := os.environ.get("POPALIGN_BENCH_JSON"):
        Path(path).write_text(text)


if __name__ == "__main__":
    steps_of(sys.argv[1])
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}\n")
