"""The paper-size job without its networks: what the processes of the benchmark of scale do.

`stand_in` replaces the model, the sampler, the detector and the classifiers of `tasks` in this process: an image is one
of a few pictures, at once, and what is perceived on it follows from its seed. Planning, claims, rows, image files,
commits, timings, pairing and catalog are the product's own. Images are 64 px instead of 1024, so the bytes are not
SDXL's.
`python paper_size.py STEP WORKSPACE SHARE` does one step and writes JSON. SHARE: of the paper's images a prompt.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peak_memory import peak_mib

import tasks.classification as classification_tasks
import tasks.sampling as sampling_tasks
import tasks.stored_shard as stored_shard
from popalign_core.attributes import Axis
from popalign_core.classification import AxisProbabilities
from popalign_core.config import RunConfig, with_settings
from popalign_core.detection import Box
from popalign_core.models.sdxl import ModelSource
from popalign_core.presets import preset
from popalign_core.sampling import ImageRequest, SampledImage, SamplingSettings
from storage.catalog import query, rebuild_catalog
from storage.layout import Workspace
from tasks.classification import check_classified, classify_shard
from tasks.expansion import write_prompts
from tasks.labels import labelled_samples
from tasks.plan import planned_work
from tasks.populations import build_preferences
from tasks.run import BASE, record_run, run_config
from tasks.sampling import plan_shards, sample_shard
from tasks.shards import claim_each, missing_attributes, missing_samples
from tasks.summary import run_states

RUN = "paper"
SIDE, PICTURES = 64, 64


class Part(NamedTuple):
    """Images of one model for one purpose, and who classifies them."""

    model_id: str
    purpose: str
    role: str


# 300 trained prompts: 100 neutral images and 10 for each of 12 groups, 66,000 in all. 100 held-out prompts: 580 neutral
# images and 10 for each group, 70,000 of either model: here twice as many of one, since there is no training.
PARTS = (Part(BASE, "round-1", "builder"), Part(BASE, "evaluation", "judge"), Part(BASE, "obedience", "judge"))
QUERIES = {
    "images a model": "SELECT model_id, count(*) FROM samples GROUP BY ALL",
    "labels a model and axis": "SELECT model_id, axis, label, status, count(*) FROM attributes GROUP BY ALL",
    "labels a prompt": "SELECT prompt_id, axis, label, count(*) FROM attributes WHERE status = 'ok' GROUP BY ALL",
    "one prompt's images": """SELECT s.sample_id, a.axis, a.label FROM samples s JOIN attributes a USING (sample_id)
        WHERE s.prompt_id = (SELECT min(prompt_id) FROM samples)""",
    "seconds a stage": "SELECT stage, sum(items), sum(seconds) FROM timings GROUP BY ALL",
    "models": "FROM model_registry",
}


class StubModel:
    """Stands where the loaded pipeline would."""

    device = torch.device("cpu")

    def __init__(self, source: ModelSource, *_: object):
        self.source = source


@cache
def pictures() -> list[np.ndarray]:
    """Smooth pictures, uint8 (64, 64, 3); lossless they take about 10 kB each."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.stack([np.sin(k * x + c) * np.cos((k + c) * y) for c in range(3)], -1) for k in range(PICTURES)]
    return [np.round(127.5 * (1 + wave)).astype(np.uint8) for wave in waves]


def draw_at_once(_: StubModel, requests: Sequence[ImageRequest], settings: SamplingSettings) -> Iterator[list[Any]]:
    for start in range(0, len(requests), settings.batch_size):
        batch = requests[start : start + settings.batch_size]
        size, nothing = settings.batch_size, torch.zeros(0)
        yield [SampledImage(request, pictures()[request.seed % PICTURES], size, nothing) for request in batch]


class StubClassifier:
    """Perceives what the bytes of a picture say: every group somewhere, three quarters of the images as one."""

    classifier_id = "stub"

    def probabilities(self, images: Sequence[np.ndarray], axes: Sequence[Axis]) -> list[AxisProbabilities]:
        marks = np.array([image.astype(np.int64).sum() for image in images])
        found: list[AxisProbabilities] = []
        for axis in axes:
            groups = len(axis.groups)
            best = np.where(marks % 4, 0, marks // 4 % groups)
            table = np.full((len(images), groups), 0.1 / groups)
            table[np.arange(len(images)), best] += 0.9
            found.append(AxisProbabilities(axis, table, np.zeros(len(images))))
        return found


class StubBuilder:
    """Sees in a picture a vector as long as one of ViT-L/14."""

    classifier_id = "stub"
    device = torch.device("cpu")

    def image_features(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        marks = torch.tensor([int(image[:, :, 0].astype(np.int64).sum()) for image in images])
        return torch.nn.functional.normalize(marks[:, None] % torch.arange(1, 769) + 1.0, dim=-1)


class StubDetector:
    """Sees one person, in the middle of every picture."""

    detector_id = "stub"

    def find(self, images: np.ndarray) -> list[list[Box]]:
        quarter = SIDE // 4
        return [[Box(quarter, quarter, SIDE - quarter, SIDE - quarter, 0.9)]] * len(images)


def stand_in() -> None:
    """For the rest of this process."""
    sampling_tasks.loaded_model = StubModel
    sampling_tasks.sample_images = draw_at_once
    sampling_tasks.provide_embeddings = lambda *_: None
    sampling_tasks.fitting = lambda _workspace, _model, settings: settings
    sampling_tasks.sampler_facts = lambda *_: {"sampler": "stub"}
    classification_tasks.classifier_of = lambda *_: StubClassifier()
    stored_shard.detector = lambda *_: StubDetector()
    stored_shard.builder = lambda *_: StubBuilder()


def configuration(share: float) -> RunConfig:
    """The paper's code at a share of its images a prompt; prompts stay as many."""
    wanted = {"train_neutral": 100, "train_specific": 10, "evaluation": 2 * 580, "obedience": 2 * 10}
    counts = {f"images.{name}": str(max(1, round(share * count))) for name, count in wanted.items()}
    changes = {"device": "cpu", "images.trained": "0", "images.validation": "1"}
    changes["populations.size"] = counts["images.train_neutral"]
    return with_settings(preset("sdxl-paper"), counts | changes)


def prepare(workspace: str, config: RunConfig) -> dict[str, Any]:
    record_run(workspace, RUN, "sdxl-paper", config)
    write_prompts.fn(workspace, RUN, config.expansion)
    return {}


def draw(workspace: str, config: RunConfig, most: float = 1.0) -> dict[str, Any]:
    """Draws and classifies that share of the shards; CPU seconds a shard, the first and the last tenth of them."""
    seconds: dict[str, list[float]] = {"sampling": [], "classification": []}
    begin = time.process_time()
    for part in PARTS:
        place = (workspace, RUN, config, part.model_id, part.purpose)
        count = round(most * len(plan_shards(*place)))
        for stage, task, left in (
            ("sampling", sample_shard, missing_samples(*place)),
            ("classification", classify_shard, missing_attributes(*place, part.role)),
        ):
            for ref in claim_each([ref for ref in left if int(ref.key.split(".")[2]) < count]):
                started = time.process_time()
                task.fn(ref, config)
                seconds[stage].append(time.process_time() - started)
    return {"cpu_s": time.process_time() - begin} | {name: _tenths(found) for name, found in seconds.items()}


def _tenths(seconds: list[float]) -> dict[str, float]:
    tenth = max(1, len(seconds) // 10)
    first, last = (float(np.median(part)) for part in (seconds[:tenth], seconds[-tenth:]))
    return {"shards": len(seconds), "first_tenth_s": first, "last_tenth_s": last, "cpu_s": sum(seconds)}


def half(workspace: str, config: RunConfig) -> dict[str, Any]:
    return draw(workspace, config, 0.5)


def resume(workspace: str, config: RunConfig) -> dict[str, Any]:
    """What a process does before its first piece of work on a run that was begun."""
    started = _timed(lambda: record_run(workspace, RUN, "sdxl-paper", config))
    found: list[int] = []

    def look() -> None:
        for part in PARTS:
            place = (workspace, RUN, config, part.model_id, part.purpose)
            found.append(len(missing_samples(*place)))
            found.append(len(missing_attributes(*place, part.role)))

    planning, again = _timed(look), _timed(look)
    return {
        "start_s": started,
        "planning_s": planning,
        "planning_again_s": again,
        "left": sum(found[: len(found) // 2]),
    }


def pair(workspace: str, config: RunConfig) -> dict[str, Any]:
    """The steps that read a whole purpose at once."""
    train, held_out = PARTS[0], PARTS[1]
    shards = plan_shards(workspace, RUN, config, train.model_id, train.purpose)
    preferences = _timed(lambda: build_preferences.fn(workspace, RUN, config, BASE, 1))
    return {"preferences_s": preferences, "check_s": _timed(lambda: check_classified(shards, train.role, config))} | {
        "labels_s": _timed(lambda: _labels(workspace, config, held_out))
    }


def _labels(workspace: str, config: RunConfig, part: Part) -> None:
    labelled_samples(workspace, RUN, config, part.model_id, part.purpose, part.role)


def ask(workspace: str, _: RunConfig) -> dict[str, Any]:
    """Catalog and overviews."""
    place = Workspace.open(workspace)
    times = {"catalog_s": _timed(lambda: rebuild_catalog(place)), "status_s": _timed(lambda: run_states(place))}
    times["plan_s"] = _timed(lambda: planned_work(configuration_of(place), workspace, RUN))
    return times | {name: _timed(lambda sql=sql: query(place, sql)) for name, sql in QUERIES.items()}


def configuration_of(place: Workspace) -> RunConfig:
    return run_config(str(place.root), RUN)


def count(workspace: str, config: RunConfig) -> dict[str, Any]:
    """Files, bytes and images as they lie on the disk."""
    files = [path for path in Path(workspace).rglob("*") if path.is_file()]
    images = [path for path in files if path.name == "images.parquet"]
    drawn = sum(
        len(sampling_tasks.planned_requests(workspace, RUN, config, part.model_id, part.purpose)) for part in PARTS
    )
    total, pixels = (sum(path.stat().st_size for path in found) for found in (files, images))
    return {"images": drawn, "shards": len(images), "files": len(files), "bytes": total, "image_bytes": pixels}


def _timed(work: Callable[[], object]) -> float:
    """CPU seconds of all threads: those that wait for a busy machine do not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


STEPS = {step.__name__: step for step in (prepare, half, resume, draw, pair, ask, count)}

if __name__ == "__main__":
    stand_in()
    step, root, share = sys.argv[1:]
    before = peak_mib()
    numbers = STEPS[step](str(Workspace.open(root).root), configuration(float(share)))
    sys.stdout.write(json.dumps(numbers | {"mib_before": before, "mib_peak": peak_mib()}) + "\n")
