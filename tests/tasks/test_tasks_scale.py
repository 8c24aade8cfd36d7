"""A run of many shards costs as much a shard as one of few, counted in calls of the file system and not in time."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

import tasks.sampling as sampling_tasks
from popalign_core.config import RunConfig, with_settings
from popalign_core.presets import preset
from popalign_core.sampling import SampledImage, SamplingSettings
from storage.layout import Workspace
from tasks.expansion import write_prompts
from tasks.run import BASE, record_run
from tasks.sampling import plan_shards, sample_shard
from tasks.shards import claim_each, missing_attributes, missing_samples
from tasks.summary import run_states

RUN, IMAGES = "night", 48
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove"}
_counts: list[Counter[str]] = []


def _hear(event: str, _: object) -> None:
    if _counts and event in EVENTS:
        _counts[-1][event] += 1


sys.addaudithook(_hear)


def config_of(shards: int) -> RunConfig:
    changes = {
        "device": "cpu",
        "expansion.prompts": "emoji-occupations",
        "expansion.max_subjects": "6",
        "images.evaluation": str(IMAGES // 6),
        "sampling.shard_size": str(IMAGES // shards),
    }
    return with_settings(preset("emoji"), changes)


class Entries(AbstractContextManager["Entries"]):
    """What a folder's listing gave."""

    def __init__(self, found: list):
        self.found = iter(found)

    def __iter__(self) -> Iterator:
        return self.found

    def __exit__(self, *_: object) -> None:
        return None


class StubModel:
    device = torch.device("cpu")


@pytest.fixture(autouse=True)
def drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: object, requests: list, settings: SamplingSettings) -> Iterator[list[SampledImage]]:
        pixels = [np.full((8, 8, 3), request.seed % 256, np.uint8) for request in requests]
        yield [
            SampledImage(r, image, settings.batch_size, torch.zeros(0))
            for r, image in zip(requests, pixels, strict=True)
        ]

    monkeypatch.setattr(sampling_tasks, "loaded_model", lambda *_: StubModel())
    monkeypatch.setattr(sampling_tasks, "sample_images", draw)
    monkeypatch.setattr(sampling_tasks, "provide_embeddings", lambda *_: None)
    monkeypatch.setattr(sampling_tasks, "fitting", lambda _place, _model, settings: settings)
    monkeypatch.setattr(sampling_tasks, "sampler_facts", lambda *_: {"sampler": "stub"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Counts the calls of the file system that something makes from Python, and the entries of listings."""
    stat, listdir, scandir = os.stat, os.listdir, os.scandir

    def tell(what: str, count: int = 1) -> None:
        if _counts:
            _counts[-1][what] += count

    def counted_stat(*values: object, **options: object) -> os.stat_result:
        tell("stat")
        return stat(*values, **options)  # type: ignore[arg-type]

    def counted_listdir(*values: object) -> list:
        found = listdir(*values)  # type: ignore[call-overload]
        tell("entry", 1 + len(found))
        return found

    def counted_scandir(*values: object) -> Entries:
        with scandir(*values) as entries:  # type: ignore[call-overload]
            found = list(entries)
        tell("entry", 1 + len(found))
        return Entries(found)

    for name, function in (("stat", counted_stat), ("listdir", counted_listdir), ("scandir", counted_scandir)):
        monkeypatch.setattr(os, name, function)

    def count(work: Callable[[], object]) -> int:
        _counts.append(Counter())
        try:
            work()
        finally:
            found = _counts.pop()
        return found.total()

    return count


def prepared(tmp_path, shards: int) -> tuple[str, RunConfig]:
    place, config = str(Workspace.open(tmp_path / f"of-{shards}").root), config_of(shards)
    record_run(place, RUN, "emoji", config)
    write_prompts.fn(place, RUN, config.expansion)
    assert len(plan_shards(place, RUN, config, BASE, "evaluation")) == shards
    return place, config


def test_the_last_shard_takes_as_many_calls_as_the_second(tmp_path, calls):
    place, config = prepared(tmp_path, 24)
    costs: list[int] = []
    for ref in claim_each(plan_shards(place, RUN, config, BASE, "evaluation")):
        costs.append(calls(lambda ref=ref: sample_shard.fn(ref, config)))
    assert len(costs) == 24
    assert max(costs[2:]) <= costs[1]


@pytest.mark.parametrize("what", ["samples", "attributes", "start", "status"])
def test_what_looks_at_a_half_finished_run_grows_with_its_shards_and_no_faster(tmp_path, calls, what):
    found = []
    for shards in (6, 12, 24):
        place, config = prepared(tmp_path, shards)
        refs = plan_shards(place, RUN, config, BASE, "evaluation")
        for ref in refs[::2]:
            sample_shard.fn(ref, config)
        looks = {
            "samples": lambda p=place, c=config: missing_samples(p, RUN, c, BASE, "evaluation"),
            "attributes": lambda p=place, c=config: missing_attributes(p, RUN, c, BASE, "evaluation", "judge"),
            "start": lambda p=place, c=config: record_run(p, RUN, "emoji", c),
            "status": lambda p=place: run_states(Workspace(type(tmp_path)(p))),
        }
        looks[what]()  # what is read once
        found.append(calls(looks[what]))
    assert found[0] > 0
    # From 12 to 24 at most twice as much more as from 6 to 12.
    assert found[2] - found[1] <= 2 * (found[1] - found[0])
