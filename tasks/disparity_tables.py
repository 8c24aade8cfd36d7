"""Rows of the tables about disparities: every target, every level, and what changed image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from popalign_core.assessment.disparity_rows import Counted, measure_disparities
from popalign_core.assessment.diversity import group_diversity
from popalign_core.assessment.permutation import Labels, prompt_changes
from popalign_core.assessment.pooled_shares import pooled_shares
from popalign_core.assessment.uncertainty import share_interval
from popalign_core.attributes import AXES, Axis
from popalign_core.config import RunConfig
from popalign_core.expansion import Prompt
from popalign_core.population_counts import LabelledSample, by_prompt
from popalign_core.target_shares import UNIFORM, Target, load_targets
from tasks.labels import labelled_samples
from tasks.run import BASE
from tasks.sampling import plan_shards
from tasks.stored_shard import StoredShard

Row = dict[str, object]


@dataclass(frozen=True, eq=False)
class Measured:
    """Judged samples of a model on one purpose. features: the builder's, (samples, dims), or of none."""

    samples: Sequence[LabelledSample]
    features: np.ndarray

    @cached_property
    def cells(self) -> dict[str, list[tuple[str | None, ...]]]:
        """By prompt."""
        return {prompt: [sample.cell for sample in own] for prompt, own in by_prompt(self.samples).items()}

    @cached_property
    def prompt_ids(self) -> list[str]:
        """Of each sample."""
        return [sample.prompt_id for sample in self.samples]


def read_measured(
    workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str, *, features: bool = True
) -> Measured:
    """From the committed labels of the judge, and the vectors of the builder. features: False = without these."""
    samples = labelled_samples(workspace, run_id, config, model_id, purpose, "judge")
    if not features:
        return Measured(samples, np.zeros((0, 0)))
    shards = plan_shards(workspace, run_id, config, model_id, purpose)
    return Measured(
        samples, np.concatenate([StoredShard(shard, config).embeddings.of_whole_images for shard in shards])
    )


@dataclass(frozen=True)
class DisparityTables:
    """targets: those beside the uniform one. prompts: by id."""

    config: RunConfig
    targets: Sequence[Target]
    prompts: Mapping[str, Prompt]

    @classmethod
    def of(cls, config: RunConfig, prompts: Mapping[str, Prompt]) -> "DisparityTables":
        """Raises: TargetNotUsable."""
        return cls(config, load_targets(config.assessment.targets), prompts)

    def disparities(self, identity: Row, axis: Axis, counts: Counted) -> list[Row]:
        """Of one model: to the uniform target, and to every other that says something of a prompt here."""
        subjects = {prompt: self.prompts[prompt].subject for prompt in counts}
        strata = {prompt: self.prompts[prompt].suite for prompt in counts}
        settings: dict[str, Any] = {"seed": self.config.seed, "strata": strata}
        settings["resamples"] = self.config.assessment.resamples
        rows = measure_disparities(counts, axis, axis.uniform(), name=UNIFORM, **settings)
        for target in self.targets:
            if shares := target.shares(axis, subjects):
                rows += measure_disparities(counts, axis, shares, name=target.name, **settings)
        return [{**identity, **asdict(row)} for row in rows]

    def shares(self, identity: Row, axis: Axis, counts: Mapping[str, tuple[np.ndarray, int]]) -> list[Row]:
        """Every group's share in each prompt, and in all of them together (prompt_id None)."""
        rows: list[Row] = []
        for prompt_id, (found, _) in counts.items():
            n = int(np.sum(found))
            for group, count in zip(axis.groups, np.asarray(found).tolist(), strict=True):
                low, high, interval = share_interval(count, n)
                row = {"prompt_id": prompt_id, "axis": axis.name, "group": group, "count": count, "n": n}
                ends = {"low": low, "high": high, "interval": interval}
                rows.append({**identity, **row, "share": count / n if n else float("nan"), **ends})
        table = np.stack([found for found, _ in counts.values()])
        for group, count, pooled in zip(axis.groups, table.sum(axis=0).tolist(), pooled_shares(table), strict=True):
            row = {"prompt_id": None, "axis": axis.name, "group": group, "count": count, "n": pooled.n}
            ends = {"low": pooled.low, "high": pooled.high, "interval": "prompts"}
            rows.append({**identity, **row, "share": pooled.value, **ends})
        return rows

    def target_rows(self, run_id: str) -> list[Row]:
        """What the targets say."""
        return [
            {"run_id": run_id, "target": target.name, **asdict(row)} for target in self.targets for row in target.rows
        ]

    def changes(self, identity: Row, axis: Axis, before: Labels, after: Labels) -> list[Row]:
        """Prompt by prompt, the two images of one noise as a pair."""
        rows = prompt_changes(before, after, axis, seed=self.config.seed)
        return [{**identity, "base_model_id": BASE, **asdict(row)} for row in rows]

    def diversities(self, identity: Mapping[str, object], measured: Mapping[str, Measured]) -> list[Row]:
        """Of both models, on every axis; a score is null where a group has too few images."""
        features = {model: own.features for model, own in measured.items()}
        rows: list[Row] = []
        for position, name in enumerate(self.config.expansion.axes):
            labels = {model: [sample.cell[position] for sample in own.samples] for model, own in measured.items()}
            for found in group_diversity(features, labels, AXES[name], seed=self.config.seed):
                known = {field: None if value != value else value for field, value in asdict(found).items()}
                rows.append({**identity, "axis": name, **known})
        return rows
