"""Workspaces as large as years of nights make them, written through the product's own commits, for the catalog."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from storage.artifacts import ArtifactRef
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import write_rows

AXES = {"perceived_gender": ("woman", "man"), "perceived_race": ("black", "east_asian", "indian", "white")}
CLASSIFIERS = ("builder-0123456789abcdef", "judge-fedcba9876543210")
MODELS = ("base", "round-1-0123456789ab")
PROMPTS, IMAGES, A_SHARD = 500, 250, 1000
IMAGE_BYTES = 1024
# Rows of `attributes` in a run: each image, axis and classifier.
ROWS = len(MODELS) * PROMPTS * IMAGES * len(AXES) * len(CLASSIFIERS)
MEASURES = ("l2", "l2_squared_unbiased", "total_variation", "jensen_shannon", "entropy")


def write_night(place: Workspace, run_id: str, seed: int, *, pictures: bool) -> None:
    """A decided run: 250,000 images of two models, perceived by two classifiers on two axes.

    pictures: with the bytes of every image, 1 kB each.
    """
    random = np.random.default_rng(seed)
    for model in MODELS:
        for shard, samples in enumerate(_samples(run_id, model)):
            key = f"{model}.evaluation.{shard:05d}"
            tables = {"samples": samples}
            if pictures:
                tables["images"] = _pictures(samples, random)
            _commit(place, run_id, "samples", key, tables)
            for classifier in CLASSIFIERS:
                rows = _perceived(samples, classifier, random)
                _commit(place, run_id, "attributes", f"{key}.{classifier[:5]}", {"attributes": rows})
    write_figures(place, run_id, seed, PROMPTS)


def write_figures(place: Workspace, run_id: str, seed: int, prompts: int) -> None:
    """What a decided run says beside its images, of so many prompts."""
    random = np.random.default_rng(seed)
    night = f"2026-{1 + seed // 28 % 12:02d}-{1 + seed % 28:02d}T03:00:00+00:00"
    start = {"run_id": run_id, "started_at": night, "versions_json": "{}"}
    _commit(place, run_id, "runs", "run", {"runs": [{"run_id": run_id, "preset": "sdxl", "config_json": "{}"}]})
    _commit(place, run_id, "starts", "first", {"starts": [start]})
    _commit(place, run_id, "prompts", "all", {"prompts": [_prompt(run_id, index) for index in range(prompts)]})
    figures = {"disparities": _disparities(run_id, prompts, random), "group_shares": _shares(run_id, prompts, random)}
    _commit(place, run_id, "disparities", "all", figures | {"comparisons": _comparisons(run_id)})
    decision = {"run_id": run_id, "base_model_id": MODELS[0], "model_id": MODELS[1], "verdict": "hold", "reason": "r"}
    _commit(place, run_id, "decisions", "all", {"decisions": [decision | {"checks": []}]})
    for key in ("sampling-0", "classification-0"):
        timing = {"run_id": run_id, "stage": key[:-2], "key": key, "seconds": 60.0, "items": 1000, "device": "cuda"}
        _commit(place, run_id, "timings", key, {"timings": [timing]})


def _commit(place: Workspace, run_id: str, folder: str, key: str, tables: dict[str, Any]) -> None:
    with staged_artifact(ArtifactRef(str(place.root), run_id, folder, key)) as staged:
        for name, rows in tables.items():
            write_rows(staged, name, rows)


def prompt_id(index: int) -> str:
    return f"{index * 2654435761 % 2**48:012x}"


def _prompt(run_id: str, index: int) -> dict[str, Any]:
    text = f"a photo of a worker {index}"
    named = {"run_id": run_id, "prompt_id": prompt_id(index), "split": "eval", "suite": "occupations"}
    shared = {"subject": f"worker {index}", "kind": "neutral", "prefix": "a photo of a", "requested": []}
    return named | shared | {"text": text}


def _samples(run_id: str, model: str) -> Iterator[pa.Table]:
    for start in range(0, PROMPTS * IMAGES, A_SHARD):
        places = [divmod(index, IMAGES) for index in range(start, start + A_SHARD)]
        count = len(places)
        columns: dict[str, Any] = {
            "run_id": [run_id] * count,
            "model_id": [model] * count,
            "prompt_id": [prompt_id(prompt) for prompt, _ in places],
            "sample_index": pa.array([index for _, index in places], pa.int32()),
            "sample_id": [f"{model}/{prompt_id(prompt)}/{index}" for prompt, index in places],
            "seed": [prompt * 100_003 + index for prompt, index in places],
            "width": pa.array([1024] * count, pa.int32()),
            "height": pa.array([1024] * count, pa.int32()),
            "image_sha256": [f"{start + row:064x}" for row in range(count)],
            "sampler_fingerprint": ["0123456789abcdef"] * count,
        }
        yield pa.table(columns)


def _pictures(samples: pa.Table, random: np.random.Generator) -> pa.Table:
    images = [random.bytes(IMAGE_BYTES) for _ in range(len(samples))]
    return pa.table({"sample_id": samples["sample_id"], "image": images, "format": ["webp"] * len(samples)})


def _perceived(samples: pa.Table, classifier: str, random: np.random.Generator) -> pa.Table:
    parts: list[pa.Table] = []
    count = len(samples)
    for axis, groups in AXES.items():
        chances = random.dirichlet([0.5] * len(groups), count).astype(np.float32)
        seen = random.random(count) < 0.97
        labels = np.array(groups, dtype=object)[chances.argmax(1)]
        columns: dict[str, Any] = {name: samples[name] for name in ("run_id", "model_id", "sample_id", "prompt_id")}
        columns |= {
            "classifier_id": [classifier] * count,
            "axis": [axis] * count,
            "label": pa.array([label if ok else None for label, ok in zip(labels, seen, strict=True)], pa.string()),
            "confidence": chances.max(1),
            "probabilities": pa.array(list(chances), pa.list_(pa.float32())),
            "status": ["ok" if ok else "no_face" for ok in seen],
        }
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def _figures(run_id: str, prompts: int) -> Iterator[tuple[dict[str, Any], str | None]]:
    for model in MODELS:
        for axis in AXES:
            named = {"run_id": run_id, "model_id": model, "judge_id": CLASSIFIERS[1], "split": "eval", "axis": axis}
            for prompt in (None, *map(prompt_id, range(prompts))):
                yield named, prompt


def _disparities(run_id: str, prompts: int, random: np.random.Generator) -> list[dict[str, Any]]:
    numbers = {"target": "uniform", "low": 0.1, "high": 0.3, "floor": 0.05, "n": IMAGES, "unknown": 7}
    return [
        named
        | numbers
        | {"prompt_id": prompt, "level": "prompt" if prompt else "mean", "measure": measure, "value": random.random()}
        for named, prompt in _figures(run_id, prompts)
        for measure in MEASURES
    ]


def _shares(run_id: str, prompts: int, random: np.random.Generator) -> list[dict[str, Any]]:
    numbers = {"n": IMAGES, "low": 0.1, "high": 0.9, "interval": "wilson"}
    return [
        named | numbers | {"prompt_id": prompt, "group": group, "count": int(count), "share": count / IMAGES}
        for named, prompt in _figures(run_id, prompts)
        for group, count in zip(
            AXES[named["axis"]],
            random.multinomial(IMAGES, [1 / len(AXES[named["axis"]])] * len(AXES[named["axis"]])),
            strict=True,
        )
    ]


def _comparisons(run_id: str) -> list[dict[str, Any]]:
    named = {"run_id": run_id, "base_model_id": MODELS[0], "model_id": MODELS[1], "judge_id": CLASSIFIERS[1]}
    figures = ("before", "after", "difference", "difference_low", "difference_high", "ratio", "ratio_low", "ratio_high")
    return [
        named | {"split": "eval", "axis": axis, "measure": measure} | dict.fromkeys(figures, 0.5)
        for axis in AXES
        for measure in MEASURES
    ]
