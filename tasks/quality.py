"""What the configured scorers say of a shard of images, and the assessment's rows of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.distances import distance_to_base, group_distance
from popalign_core.assessment.metric_frame import MetricFrame, metric_frame
from popalign_core.assessment.quality import compare_scores, estimate_score, paired_cosines
from popalign_core.assessment.resampling import Comparison, Estimate
from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.detection import WHOLE
from popalign_core.models.scorers import FeatureExtractor, Scorer, load_scorer, scorer_id
from popalign_core.models.sdxl import pick_device
from popalign_core.quality_config import SCORERS
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.embeddings import Embeddings, read_embeddings, write_embeddings
from storage.tables import read_artifact, write_rows
from tasks.disparity_tables import Measured
from tasks.events import announce_commit
from tasks.progress import progress_of
from tasks.run import BASE, passes, placed, read_prompts, reference, timed
from tasks.sampling import asked_for, plan_shards
from tasks.stored_shard import SEEN_BY_BOTH, StoredShard

# Quality is of prompts that leave the person open; obedience is judged by the labels alone.
PURPOSES = SEEN_BY_BOTH
SCORES, FEATURES = "image_scores", "image_features"
Row = dict[str, object]


def scored(samples: ArtifactRef, kind: str) -> ArtifactRef:
    """Where a scorer's numbers, or features, of a shard of samples go."""
    table = SCORES if SCORERS[kind].unit else FEATURES
    return reference(samples.workspace, samples.run_id, table, f"{samples.key}.{kind}")


def missing_scores(workspace: str, run_id: str, config: RunConfig, model_id: str) -> list[ArtifactRef]:
    """What is not committed yet of both models; by scorer, since one is in memory at a time."""
    shards = [
        shard
        for model in dict.fromkeys((BASE, model_id))
        for purpose in PURPOSES
        for shard in plan_shards(workspace, run_id, config, model, purpose)
    ]
    found = [scored(shard, kind) for kind in config.quality.sources for shard in shards]
    return [ref for ref in found if not is_committed(ref)]


@lru_cache(maxsize=1)
def _scorer(kind: str, source: str, device: str) -> Scorer | FeatureExtractor:
    return load_scorer(kind, source, device)


@task(
    cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 60], retry_jitter_factor=0.5, retry_condition_fn=passes
)
def score_shard(ref: ArtifactRef, config: RunConfig) -> ArtifactRef:
    """Commits `image_scores` or `image_features` of a shard: one row an image. ref: as `scored` gives it."""
    if is_committed(ref):
        return ref
    key, kind = ref.key.rsplit(".", 1)
    shard = StoredShard(reference(ref.workspace, ref.run_id, "samples", key), config)
    source = placed(ref.workspace, config.quality.sources[kind])
    said_by = scorer_id(kind, source)
    model_id, purpose, _ = key.rsplit(".", 2)
    with (
        timed(ref, "scoring", pick_device(config.device).type) as facts,
        progress_of(f"scoring {model_id} {asked_for(purpose)} {kind}") as advance,
    ):
        scorer = _scorer(kind, source, config.device)
        if isinstance(scorer, Scorer):
            texts = {prompt.prompt_id: prompt.text for prompt in read_prompts(ref.workspace, ref.run_id)}
            values = scorer.scores(shard.images, [texts[str(row["prompt_id"])] for row in shard.rows])
            names = ("run_id", "model_id", "sample_id", "prompt_id")
            rows = [
                {**{name: row[name] for name in names}, "scorer_id": said_by, "measure": kind, "value": float(value)}
                for row, value in zip(shard.rows, values, strict=True)
            ]
            with staged_artifact(ref) as folder:
                write_rows(folder, SCORES, rows)
        else:
            found = Embeddings(said_by, shard.sample_ids, [WHOLE] * len(shard.rows), scorer.features(shard.images))
            with staged_artifact(ref) as folder:
                write_embeddings(folder, ref.run_id, model_id, found, FEATURES)
        facts["items"] = len(shard.rows)
        advance(len(shard.rows))
    announce_commit(ref, len(shard.rows))
    return ref


class QualityRows:
    """Rows of the configured scorers about base and aligned model. judge_id: whose groups the images are in."""

    def __init__(self, workspace: str, run_id: str, config: RunConfig, model_id: str, judge_id: str):
        self.workspace, self.run_id, self.config, self.model_id = workspace, run_id, config, model_id
        self.judge_id = judge_id
        self.scores: list[Row] = []
        self.group_scores: list[Row] = []
        self.group_gaps: list[Row] = []
        self.distances: list[Row] = []
        self.group_distances: list[Row] = []
        # Of held-out prompts, by measure: what changed, and the spread between the base model's images.
        self.held_out: dict[str, tuple[Comparison, float]] = {}
        self.changes: list[tuple[str, str, str, Comparison]] = []

    def measure(self, purpose: str, split: str, measured: Mapping[str, Measured]) -> None:
        """All scorers over one purpose. measured: by model, in the order of its shards."""
        for kind, source in self.config.quality.sources.items():
            said_by = scorer_id(kind, placed(self.workspace, source))
            if SCORERS[kind].unit:
                values = {model: self._scores(model, purpose, kind) for model in measured}
                self.add_scores(kind, SCORERS[kind].unit, said_by, split, measured, values)
            else:
                features = {model: self._features(model, purpose, kind) for model in measured}
                for measure in SCORERS[kind].distances:
                    self.add_distance(measure, said_by, split, features, measured)

    def add_scores(
        self,
        measure: str,
        unit: str,
        said_by: str,
        split: str,
        measured: Mapping[str, Measured],
        values: Mapping[str, np.ndarray],
    ) -> None:
        """Overall, in each perceived group, and what changed. values: one an image, by model."""
        for model, own in values.items():
            identity: Row = {"run_id": self.run_id, "model_id": model, "split": split, "measure": measure, "unit": unit}
            overall = self._estimate(own, measured[model].prompt_ids, measure, split)
            self.scores.append({**identity, "judge_id": said_by, "kind": "neutral", **_numbers(overall)})
            identity |= {"judge_id": self.judge_id, "scorer_id": said_by}
            for name, groups in self._groups(measured[model]).items():
                said = {**identity, "axis": name}
                if not any(groups):  # nobody's is known
                    nothing = _numbers(None)
                    self.group_scores += [{**said, "group": group, **nothing} for group in AXES[name].groups]
                    continue
                frame = metric_frame(
                    own,
                    groups,
                    measured[model].prompt_ids,
                    AXES[name].groups,
                    rng=self._rng(measure, split),
                    n_boot=self.config.assessment.resamples,
                )
                self.group_scores += [
                    {**said, "group": group, **_numbers(found)} for group, found in frame.by_group.items()
                ]
                self.group_gaps.append({**said, **_gap(frame)})
        change = self._compare(measure, split, measured, values)
        self.changes.append((split, measure, said_by, change))
        if split == "eval":
            self.held_out[measure] = change, float(np.std(values[BASE], ddof=1))

    def _estimate(self, values: np.ndarray, prompt_ids: Sequence[str], measure: str, split: str) -> Estimate:
        resamples = self.config.assessment.resamples
        return estimate_score(values, prompt_ids, rng=self._rng(measure, split), resamples=resamples)

    def _compare(
        self, measure: str, split: str, measured: Mapping[str, Measured], values: Mapping[str, np.ndarray]
    ) -> Comparison:
        return compare_scores(
            values[BASE],
            values[self.model_id],
            measured[BASE].prompt_ids,
            measured[self.model_id].prompt_ids,
            rng=self._rng(measure, split),
            resamples=self.config.assessment.resamples,
        )

    def _rng(self, *names: str) -> np.random.Generator:
        # Not by model: before and after are then of the same drawn prompts.
        return np.random.default_rng(derive_seed(self.config.seed, "assessment", "quality", *names))

    def add_distance(
        self,
        measure: str,
        said_by: str,
        split: str,
        features: Mapping[str, np.ndarray],
        measured: Mapping[str, Measured],
    ) -> None:
        """Of the aligned from the base model's images, all and by group. features: (images, dims) by model, paired."""
        seed = derive_seed(self.config.seed, "assessment", "distance", split)
        found = distance_to_base(measure, features[BASE], features[self.model_id], seed=seed)
        identity: Row = {"run_id": self.run_id, "base_model_id": BASE, "model_id": self.model_id, "split": split}
        identity["features_id"] = said_by
        self.distances.append({**identity, **asdict(found)})
        before, after = self._groups(measured[BASE]), self._groups(measured[self.model_id])
        for name in self.config.expansion.axes:
            for group in AXES[name].groups:
                sides = (
                    vectors[np.array([shown == group for shown in groups[name]], bool)]
                    for vectors, groups in ((features[BASE], before), (features[self.model_id], after))
                )
                of_group = group_distance(measure, *sides, seed=derive_seed(seed, name, group))
                said = {"judge_id": self.judge_id, "axis": name, "group": group}
                self.group_distances.append({**identity, **said, **asdict(of_group)})

    def _groups(self, measured: Measured) -> dict[str, list[str | None]]:
        """Of every image in its order, by axis; None = unknown."""
        axes = enumerate(self.config.expansion.axes)
        return {name: [sample.cell[position] for sample in measured.samples] for position, name in axes}

    def add_similarity(self, said_by: str, split: str, measured: Mapping[str, Measured]) -> None:
        """Mean cosine of the two models' images of one noise: what the same of controls is compared with."""
        base = measured[BASE]
        pairs = paired_cosines(base.features, measured[self.model_id].features)
        identity: Row = {"run_id": self.run_id, "model_id": self.model_id, "judge_id": said_by, "split": split}
        said = {"kind": "neutral", "measure": "paired_similarity", "unit": "cosine"}
        found = self._estimate(pairs, base.prompt_ids, "paired_similarity", split)
        self.scores.append({**identity, **said, **_numbers(found)})

    def _shards(self, model: str, purpose: str) -> list[ArtifactRef]:
        return plan_shards(self.workspace, self.run_id, self.config, model, purpose)

    def _scores(self, model: str, purpose: str, kind: str) -> np.ndarray:
        shards = [read_artifact(scored(shard, kind), SCORES) for shard in self._shards(model, purpose)]
        return np.array([row["value"] for rows in shards for row in rows], dtype=np.float64)

    def _features(self, model: str, purpose: str, kind: str) -> np.ndarray:
        return np.concatenate([read_embeddings(scored(shard, kind)).vectors for shard in self._shards(model, purpose)])


def _numbers(estimate: Estimate | None) -> Row:
    if estimate is None:
        return {"value": None, "low": None, "high": None, "n": 0}
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def _gap(frame: MetricFrame) -> Row:
    row: Row = {"group_min": frame.group_min, "group_max": frame.group_max, "n_boot": frame.n_boot}
    for name, found in (("overall", frame.overall), ("difference", frame.difference), ("ratio", frame.ratio)):
        ends = (None, None, None) if found is None else (found.value, found.low, found.high)
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    row |= {"null_mean": frame.null_mean, "null_high": frame.null_high}
    groups = sum(found is not None for found in frame.by_group.values())
    return row | {"groups": groups, "n": frame.overall.n, "unknown": frame.overall.unknown}
