"""Base and aligned model, measured alike and compared over the same prompts and seeds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from popalign_core.assessment.decision import Check, Thresholds, decide, quality_drop
from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.obedience import Answers, compare_obedience, obedience
from popalign_core.assessment.quality import clip_score
from popalign_core.assessment.resampling import Comparison, Estimate
from popalign_core.assessment.uncertainty import compare, compare_unknown
from popalign_core.attributes import AXES, CROSSING, Axis, cross_axes
from popalign_core.config import RunConfig
from popalign_core.models.sdxl import pick_device
from popalign_core.population_counts import crossed_label, group_counts
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.tables import write_rows
from tasks.agreement import Classified, only_for_agreement
from tasks.controls import PURPOSE as CONTROLS
from tasks.controls import control_rows
from tasks.disparity_tables import DisparityTables, Measured, read_measured
from tasks.entanglement import entanglement_rows
from tasks.quality import QualityRows
from tasks.run import BASE, builder, classifier_of, read_prompts, reference, timed
from tasks.samplers import report_differences
from tasks.sampling import plan_shards

BUILDER_ROLE, JUDGE_ROLE = "builder", "judge"
SPLITS = {"evaluation": "eval", "trained": "train"}
TABLES = (
    "disparities group_shares scores comparisons agreements status_counts prompt_changes group_diversities "
    "entanglements"
).split()
Row = dict[str, object]


def classifier_name(role: str, config: RunConfig) -> str:
    """The id, with the digest of its weights, that stands in the rows."""
    return classifier_of(role, config.classification, config.device).classifier_id


@task(cache_policy=NO_CACHE)
def assess(workspace: str, run_id: str, config: RunConfig, model_id: str) -> ArtifactRef:
    """Commits `disparities` with the tables of its folder (`storage.schemas.FOLDER`), and then `decisions`."""
    ref = reference(workspace, run_id, "disparities", model_id)
    decision = reference(workspace, run_id, "decisions", model_id)
    if is_committed(ref) and is_committed(decision):
        return ref
    purposes = (*SPLITS, "obedience", *([CONTROLS] if config.expansion.controls else []))
    shards = [
        s for model in (BASE, model_id) for p in purposes for s in plan_shards(workspace, run_id, config, model, p)
    ]
    report_differences(f"assessment of {model_id}", f"assessment.{model_id}", shards)
    with timed(ref, "assessment", pick_device(config.device).type) as facts:
        assessment = _Assessment(workspace, run_id, config, model_id)
        for purpose, split in SPLITS.items():
            if plan_shards(workspace, run_id, config, BASE, purpose):
                assessment.measure_neutral(purpose, split)
        assessment.measure_obedience()
        if config.expansion.controls:
            assessment.measure_controls()
        assessment.take_quality()
        facts["items"] = assessment.images
        with staged_artifact(ref) as folder:
            for name, rows in assessment.rows.items():
                write_rows(folder, name, rows)
    with staged_artifact(decision) as folder:
        write_rows(folder, "decisions", [assessment.decision()])
    return ref


class _Assessment:
    """Rows of one comparison, gathered purpose by purpose."""

    def __init__(self, workspace: str, run_id: str, config: RunConfig, model_id: str):
        self.workspace, self.run_id, self.config, self.model_id = workspace, run_id, config, model_id
        self.axes = [AXES[name] for name in config.expansion.axes]
        self.judge_id = classifier_name(JUDGE_ROLE, config)
        self.builder_id = classifier_name(BUILDER_ROLE, config)
        self.prompts = {prompt.prompt_id: prompt for prompt in read_prompts(workspace, run_id)}
        self.tables = DisparityTables.of(config, self.prompts)
        self.rows: dict[str, list[Row]] = {name: [] for name in TABLES}
        self.rows["target_shares"] = self.tables.target_rows(run_id)
        self.held_out: dict[str, Comparison] = {}
        self.images = 0
        self.unknown: dict[str, Comparison] = {}
        self.obeyed: dict[str, Comparison] = {}
        self.control_checks: list[Check] = []
        self.quality = QualityRows(workspace, run_id, config, model_id, self.judge_id)

    def rng(self, *names: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.config.seed, "assessment", *names))

    def measure_neutral(self, purpose: str, split: str) -> None:
        models = (BASE, self.model_id)
        measured = {model: self._read(model, purpose) for model in models}
        identity: Row = {"run_id": self.run_id, "model_id": self.model_id, "judge_id": self.judge_id, "split": split}
        measured_axes = [*self.axes, cross_axes(self.axes)] if len(self.axes) > 1 else self.axes
        for position, axis in enumerate(measured_axes):
            labels = {model: self._labels(measured[model], position) for model in models}
            counts = {
                model: {prompt: group_counts(own, axis) for prompt, own in found.items()}
                for model, found in labels.items()
            }
            for model in models:
                self._add_disparities(model, split, axis, counts[model])
            self._compare_disparity(split, axis, counts)
            self.rows["prompt_changes"] += self.tables.changes(identity, axis, labels[BASE], labels[self.model_id])
        self._add_quality(purpose, split, measured)
        shards = {m: plan_shards(self.workspace, self.run_id, self.config, m, purpose) for m in models}
        self.rows["entanglements"] += entanglement_rows(identity, self.config, shards, measured)
        said = {"run_id": self.run_id, "judge_id": self.judge_id, "features_id": self.builder_id, "split": split}
        self.rows["group_diversities"] += self.tables.diversities(said, measured)
        for model in models:
            self._add_agreement(model, purpose, split)

    def _add_agreement(self, model: str, purpose: str, split: str) -> None:
        ids = {JUDGE_ROLE: self.judge_id, BUILDER_ROLE: self.builder_id}
        images = Classified(self.workspace, self.run_id, self.config, model, purpose, ids)
        self.rows["status_counts"] += images.status_rows(split, JUDGE_ROLE)
        if self.config.classification.agreement and only_for_agreement(purpose, BUILDER_ROLE):
            self.rows["status_counts"] += images.status_rows(split, BUILDER_ROLE)
            self.rows["agreements"] += images.agreement_rows(split)

    def _add_disparities(
        self, model: str, split: str, axis: Axis, counts: Mapping[str, tuple[np.ndarray, int]]
    ) -> None:
        identity: Row = {"run_id": self.run_id, "model_id": model, "judge_id": self.judge_id, "split": split}
        self.rows["disparities"] += self.tables.disparities(identity, axis, counts)
        self.rows["group_shares"] += self.tables.shares(identity, axis, counts)

    def _compare_disparity(
        self, split: str, axis: Axis, counts: Mapping[str, Mapping[str, tuple[np.ndarray, int]]]
    ) -> None:
        prompts = sorted(counts[BASE])
        tables = [np.stack([counts[model][prompt][0] for prompt in prompts]) for model in (BASE, self.model_id)]
        before, after = tables
        unknown = [sum(counts[model][prompt][1] for prompt in prompts) for model in (BASE, self.model_id)]
        change = compare(
            before,
            after,
            axis.uniform(),
            l2_discrepancy,
            unknown=(unknown[0], unknown[1]),
            rng=self.rng("l2", split, axis.name),
            resamples=self.config.assessment.resamples,
        )
        self._add_comparison(split, axis.name, "l2", self.judge_id, change)
        left_out = [np.array([counts[model][prompt][1] for prompt in prompts]) for model in (BASE, self.model_id)]
        unknowns = [(missing, missing + table.sum(axis=1)) for missing, table in zip(left_out, tables, strict=True)]
        rise = compare_unknown(
            unknowns[0],
            unknowns[1],
            rng=self.rng("unknown", split, axis.name),
            resamples=self.config.assessment.resamples,
        )
        self._add_comparison(split, axis.name, "unknown", self.judge_id, rise)
        if split == "eval" and CROSSING not in axis.name:
            self.held_out[axis.name] = change
            self.unknown[axis.name] = rise

    def _add_quality(self, purpose: str, split: str, measured: Mapping[str, Measured]) -> None:
        texts = builder(self.config.classification, self.config.device)
        names = sorted(set(measured[BASE].prompt_ids))
        found = texts.text_features([self.prompts[name].text for name in names]).numpy()
        vectors = dict(zip(names, found, strict=True))
        scores = {
            model: clip_score(m.features, np.stack([vectors[prompt] for prompt in m.prompt_ids]))
            for model, m in measured.items()
        }
        self.quality.add_scores("clip_score", "100 x cosine", self.builder_id, split, measured, scores)
        self.quality.add_similarity(self.builder_id, split, measured)
        features = {model: m.features for model, m in measured.items()}
        self.quality.add_distance("frechet_to_base", self.builder_id, split, features, measured)
        self.quality.measure(purpose, split, measured)

    def measure_obedience(self) -> None:
        measured = {model: self._read(model, "obedience", features=False) for model in (BASE, self.model_id)}
        for position, axis in enumerate(self.axes):
            answers: dict[str, Answers] = {}
            for model, found in measured.items():
                images = [(prompt, cell[position]) for prompt, cells in found.cells.items() for cell in cells]
                answers[model] = Answers(
                    [self.prompts[prompt].requested[axis.name] for prompt, _ in images],
                    [label for _, label in images],
                    [self.prompts[prompt].family_id for prompt, _ in images],
                )
                a = answers[model]
                result = obedience(
                    a.requested,
                    a.perceived,
                    a.prompt_ids,
                    rng=self.rng("obedience", axis.name),
                    resamples=self.config.assessment.resamples,
                )
                measure = f"obedience:{axis.name}"
                self._add_score("specific", measure, "share", self.judge_id, result.unknown_is_wrong, model)
            change = compare_obedience(
                answers[BASE],
                answers[self.model_id],
                unknown_is_wrong=True,  # or a model whose people cannot be read would pass
                rng=self.rng("obedience", axis.name),
                resamples=self.config.assessment.resamples,
            )
            self._add_comparison("eval", axis.name, "obedience", self.judge_id, change)
            self.obeyed[axis.name] = change

    def measure_controls(self) -> None:
        measured = {model: self._read(model, CONTROLS) for model in (BASE, self.model_id)}
        found = control_rows(
            self.workspace, self.run_id, self.config, self.prompts, measured, (self.judge_id, self.builder_id)
        )
        self.control_checks = found.checks
        for row in found.compared:
            self._add_comparison("eval", row.axis, row.measure, row.said_by, row.change)
        for kind, estimate in found.similarities().items():
            self._add_score(kind, "paired_similarity", "cosine", self.builder_id, estimate)

    def take_quality(self) -> None:
        """Adds what the scorers said to the rows."""
        self.rows["scores"] += self.quality.scores
        for name in ("group_scores", "group_gaps", "distances", "group_distances"):
            self.rows[name] = getattr(self.quality, name)
        for split, measure, said_by, change in self.quality.changes:
            self._add_comparison(split, "", measure, said_by, change)

    def decision(self) -> Row:
        thresholds = Thresholds.of(self.config.assessment)
        scores = dict(self.quality.held_out)
        clip, _ = scores.pop("clip_score", (None, 0.0))
        margin = self.config.quality.max_drop
        falls = [quality_drop(name, change, spread, margin) for name, (change, spread) in scores.items()]
        decision = decide(self.held_out, self.obeyed, clip, self.unknown, thresholds, [*falls, *self.control_checks])
        checks = [{**asdict(check), "name": check.name} for check in decision.checks]
        identity: Row = {"run_id": self.run_id, "base_model_id": BASE, "model_id": self.model_id}
        return {**identity, "verdict": decision.verdict, "reason": decision.reason, "checks": checks}

    def _read(self, model: str, purpose: str, *, features: bool = True) -> Measured:
        found = read_measured(self.workspace, self.run_id, self.config, model, purpose, features=features)
        self.images += len(found.samples)
        return found

    def _labels(self, measured: Measured, position: int) -> dict[str, list[str | None]]:
        """Of every prompt's images in their order, which is the same for both models."""
        crossed = position >= len(self.axes)
        return {
            prompt: [crossed_label(cell) if crossed else cell[position] for cell in cells]
            for prompt, cells in measured.cells.items()
        }

    def _add_score(self, kind: str, measure: str, unit: str, said_by: str, estimate: Estimate, model: str = "") -> None:
        """Of held-out prompts. model: empty = the aligned one."""
        identity: Row = {
            "run_id": self.run_id,
            "model_id": model or self.model_id,
            "judge_id": said_by,
            "split": "eval",
        }
        value = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
        self.rows["scores"].append({**identity, "kind": kind, "measure": measure, "unit": unit, **value})

    def _add_comparison(self, split: str, axis: str, measure: str, judge_id: str, change: Comparison) -> None:
        row: dict[str, Any] = {
            "run_id": self.run_id,
            "base_model_id": BASE,
            "model_id": self.model_id,
            "judge_id": judge_id,
            "split": split,
            "axis": axis,
            "measure": measure,
            "before": change.before.value,
            "after": change.after.value,
        }
        for name, estimate in (("difference", change.difference), ("ratio", change.ratio)):
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        self.rows["comparisons"].append(row)
