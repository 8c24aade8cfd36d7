"""Seconds a training step and peak memory, by what is trained and by objective; and the paper's way beside ours.

The paper's code (500358a) trains the whole UNet on one pair a process and step, with gradient checkpointing; it encodes
both images and the caption anew in every step, and for the reference it copies the weights to host memory, the
reference's over them, and back. Re-created here from that on the same checkpoint, in this process, pair by pair; the
optimizer steps once for all pairs and not once a process, in the peer's favour. "all pairs at once" is the same with
the pairs of a step in one batch and one swap: what is left is re-encoding, swap and checkpointing.
POPALIGN_BENCH_REPETITIONS: steps timed each way, in turn (5).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count, product
from typing import Any, get_args

import pytest
import torch
from peak_memory import peak_mib

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.cache import AlignmentData, draw_batch, split_batch
from popalign_core.alignment.checkpoint import begin
from popalign_core.alignment.denoiser import TrainableDenoiser
from popalign_core.alignment.objective import popalign_loss
from popalign_core.alignment.passes import measure_errors
from popalign_core.alignment.settings import AlignmentSettings, Objective
from popalign_core.alignment.trainer import START_ROUNDING, train
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.models.trainable import PassOptions, make_policy
from popalign_core.presets import preset
from tasks.benchmarks import record_benchmark

# Compiling warns of much.
pytestmark = [pytest.mark.timeout(3600), pytest.mark.filterwarnings("default")]

CONFIG = preset("emoji")
# A step that encodes again, by one that does not. The rest of the step is the same, so 1 would say nothing.
LEAST_FROM_CACHES = 1.03
REPETITIONS = int(os.environ.get("POPALIGN_BENCH_REPETITIONS", "5"))
PAIRS = CONFIG.alignment.pairs_per_step
PARTS: dict[str, dict[str, Any]] = {
    "all of the UNet": {"lora_rank": 0, "trainable": "all"},
    "conditioning": {"lora_rank": 0, "trainable": "conditioning"},
    "LoRA, rank 16": {"lora_rank": 16, "trainable": "all"},
}
CAPTIONS = [f"a photo of a {subject}" for subject in ("cook", "farmer", "judge", "teacher", "pilot", "singer")]
FACTS: dict[str, Any] = {"pairs_a_step": PAIRS, "threads": torch.get_num_threads()}


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


def test_seconds_by_part_and_objective_are_kept() -> None:
    for part in PARTS:
        record_benchmark(f"training.part.{short(part)}", steps_of(part), "s/step", settings=FACTS)
    for name in get_args(Objective):
        if name != "reward":  # has no pairs: see the benchmark of objectives
            seconds = steps_of("conditioning", objective=name)
            record_benchmark(f"training.objective.{name}", seconds, "s/step", settings=FACTS)


def short(name: str) -> str:
    """As a name of a benchmark."""
    return name.replace("'", "").replace(", ", "-").replace(" ", "-").lower()


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
    ratio = record_benchmark(
        "training.caches", cached[1:], "s/step", peer=recomputed[1:], peer_name="encoded again", settings=FACTS
    )
    assert ratio is not None
    assert ratio >= LEAST_FROM_CACHES


class SwappedPolicy:
    """A reference in host memory whose weights take the policy's place while it is needed."""

    def __init__(self, policy: Policy):
        self.denoiser, self.compiled = policy.denoiser, False
        self._shadow = [parameter.detach().cpu().clone() for parameter in self.denoiser.parameters()]

    @contextmanager
    def reference(self) -> Iterator[TrainableDenoiser]:
        own = [parameter.detach().cpu().clone() for parameter in self.denoiser.parameters()]
        with torch.no_grad():
            for parameter, weight in zip(self.denoiser.parameters(), self._shadow, strict=True):
                parameter.copy_(weight)
        yield self.denoiser
        with torch.no_grad():
            for parameter, weight in zip(self.denoiser.parameters(), own, strict=True):
                parameter.copy_(weight)


def papers_steps(pairs_at_once: int | None, *, mixed_precision: bool = False) -> Iterator[float]:
    """Seconds of each step."""
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=mixed_precision)
    model = load_sdxl(ModelSource(CONFIG.model), dtype="float32")
    options = PassOptions(gradient_checkpointing=True)
    policy = SwappedPolicy(make_policy(model, lora_rank=0, seed=0, passes=options))
    data, settings, images = data_of(model), settings_of(**PLAIN), pixels()
    optimizer = torch.optim.AdamW(policy.denoiser.parameters(), lr=settings.learning_rate)
    for step in count():
        started = time.perf_counter()
        batch = draw_batch(data, settings, step, len(policy.denoiser.schedule))
        for part in split_batch(batch, pairs_at_once):
            rows = part.pairs
            model.encode_images(torch.cat([images[rows], images[PAIRS + rows]]))
            # Other captions every time: the model keeps the embeddings of those that it knows.
            model.encode_prompts([f"{CAPTIONS[row % len(CAPTIONS)]} {step} {row}" for row in rows.tolist()])
            errors, _ = measure_errors(policy, part, autocast)
            loss = popalign_loss(errors, settings.beta, part.labels.weights)
            (loss * len(rows) / settings.pairs_per_step).backward()
        torch.nn.utils.clip_grad_norm_(policy.denoiser.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield time.perf_counter() - started


def own_steps(**passes: bool) -> Iterator[float]:
    model = load_sdxl(ModelSource(CONFIG.model), dtype="float32")
    policy = make_policy(model, lora_rank=0, seed=0, passes=PassOptions(**passes))
    settings = settings_of(**PLAIN, mixed_precision=passes.get("mixed_precision", False))
    state = begin(policy, settings)
    for record in train(policy, data_of(model), settings, state=state):
        # A step of another objective, as rounding times beta would make it, is no figure.
        assert state.start_gap is not None
        assert state.start_gap <= START_ROUNDING
        yield record.seconds


# The paper's step has no third pass for named captions, and eight pairs.
PLAIN = {"preserve_weight": 0.0, "pairs_per_step": 8}
OURS: dict[str, Callable[[], Iterator[float]]] = {
    "float32": own_steps,
    "mixed": lambda: own_steps(mixed_precision=True),
    "mixed, compiled": lambda: own_steps(mixed_precision=True, compiled=True),
}
# The aim is 5, which float32 misses on two cores (docs/performance.md).
LEAST_RATIOS = {"float32": 3.0, "mixed": 4.0}
PEERS: dict[str, Callable[[], Iterator[float]]] = {
    "papers-way": lambda: papers_steps(1),
    "papers-way, mixed": lambda: papers_steps(1, mixed_precision=True),
    "papers-way, all pairs at once": lambda: papers_steps(None),
}


def test_training_beats_the_papers_way() -> None:
    steps = {name: way() for name, way in (OURS | PEERS).items()}
    rounds = [{name: next(way) for name, way in steps.items()} for _ in range(REPETITIONS + 1)][1:]
    pairs = {name: [PLAIN["pairs_per_step"] / found[name] for found in rounds] for name in steps}
    ratios: dict[tuple[str, str], float | None] = {}
    for own, peer in product(OURS, PEERS):
        name = f"training.{short(own)}.{short(peer)}"
        facts = FACTS | PLAIN | {"load_average": os.getloadavg()[0]}
        found = record_benchmark(name, pairs[own], "pairs/s", peer=pairs[peer], peer_name=peer, settings=facts)
        ratios[own, peer] = found
    for own, least in LEAST_RATIOS.items():
        assert (ratios[own, "papers-way"] or 0.0) >= least, own


@pytest.mark.parametrize("part", PARTS)
def test_peak_memory_is_kept(part: str) -> None:
    """In a process of its own: the peak of a process never falls."""
    run = subprocess.run([sys.executable, __file__, part], check=True, capture_output=True, text=True)
    record_benchmark(f"training.peak.{short(part)}", [json.loads(run.stdout.splitlines()[-1])], "MiB", settings=FACTS)


if __name__ == "__main__":
    steps_of(sys.argv[1])
    sys.stdout.write(f"{peak_mib():.0f}\n")
