"""What happened to prompts that an alignment must leave alone: rows, and checks of the decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.decision import Check, fact_drop, people_rise
from popalign_core.assessment.obedience import Answers, compare_obedience
from popalign_core.assessment.quality import compare_scores, estimate_score, paired_cosines
from popalign_core.assessment.resampling import Comparison, Estimate
from popalign_core.classification import Status
from popalign_core.config import RunConfig
from popalign_core.expansion import Prompt
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef
from storage.tables import read_artifact
from tasks.classification import attributes_of
from tasks.disparity_tables import Measured
from tasks.run import BASE
from tasks.sampling import plan_shards

PURPOSE = "controls"
NOBODY = (str(Status.NO_PERSON), str(Status.NO_FACE))


@dataclass(frozen=True)
class Compared:
    """One measure of both models. said_by: the classifier."""

    axis: str
    measure: str
    said_by: str
    change: Comparison


class ControlRows:
    """measured: judged controls by model, base first. builder_id: who says whether somebody is there."""

    def __init__(
        self,
        config: RunConfig,
        prompts: Mapping[str, Prompt],
        measured: Mapping[str, Measured],
        *,
        judge_id: str,
        builder_id: str,
    ):
        self.config, self.prompts, self.measured = config, prompts, measured
        self.judge_id, self.builder_id = judge_id, builder_id
        self.compared: list[Compared] = []
        self.checks: list[Check] = []

    def measure_facts(self) -> None:
        """Share of images that show what is a fact, axis by axis; an unknown image does not."""
        for position, axis in enumerate(self.config.expansion.axes):
            before, after = (self._answers(own, axis, position) for own in self.measured.values())
            if before is None or after is None:
                continue
            resamples = self.config.assessment.resamples
            change = compare_obedience(
                before, after, unknown_is_wrong=True, rng=self._rng("fact", axis), resamples=resamples
            )
            self.compared.append(Compared(axis, "fact", self.judge_id, change))
            self.checks.append(fact_drop(axis, change, self.config.assessment.max_obedience_drop))

    def _answers(self, own: Measured, axis: str, position: int) -> Answers | None:
        images = [
            (self.prompts[s.prompt_id].requested[axis], s.cell[position], s.prompt_id)
            for s in own.samples
            if axis in self.prompts[s.prompt_id].requested
        ]
        return Answers(*map(list, zip(*images, strict=True))) if images else None

    def measure_people(self, somebody: Mapping[str, Sequence[bool]]) -> None:
        """Share of images with a person, of prompts without one. somebody: of each image of `measured`, by model."""
        nobody_asked = {m: self._of_kind(own, "no_person") for m, own in self.measured.items()}
        if not any(nobody_asked[BASE]):
            return
        sides = [
            (np.array(somebody[m], dtype=float)[wanted], np.array(own.prompt_ids)[wanted].tolist())
            for (m, own), wanted in zip(self.measured.items(), nobody_asked.values(), strict=True)
        ]
        (before, ids), (after, after_ids) = sides
        resamples = self.config.assessment.resamples
        change = compare_scores(before, after, ids, after_ids, rng=self._rng("people"), resamples=resamples)
        self.compared.append(Compared("", "people_without_being_asked", self.builder_id, change))
        self.checks.append(people_rise(change, self.config.assessment.max_unknown_rise))

    def similarities(self) -> dict[str, Estimate]:
        """By kind of prompt: mean cosine of the two models' images of one noise, in the builder's features."""
        found: dict[str, Estimate] = {}
        base, aligned = self.measured.values()
        for kind in ("fact", "no_person"):
            wanted = self._of_kind(base, kind)
            if any(wanted):
                ids = np.array(base.prompt_ids)[wanted].tolist()
                pairs = paired_cosines(base.features[wanted], aligned.features[wanted])
                found[kind] = estimate_score(
                    pairs, ids, rng=self._rng("similarity", kind), resamples=self.config.assessment.resamples
                )
        return found

    def _of_kind(self, own: Measured, kind: str) -> np.ndarray:
        return np.array([self.prompts[prompt].kind == kind for prompt in own.prompt_ids], bool)

    def _rng(self, *names: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.config.seed, "assessment", "controls", *names))


def control_rows(
    workspace: str,
    run_id: str,
    config: RunConfig,
    prompts: Mapping[str, Prompt],
    measured: Mapping[str, Measured],
    ids: tuple[str, str],
) -> ControlRows:
    """All of it, of committed labels. ids: of judge and builder."""
    rows = ControlRows(config, prompts, measured, judge_id=ids[0], builder_id=ids[1])
    rows.measure_facts()
    rows.measure_people({model: somebody_there(workspace, run_id, config, model) for model in measured})
    return rows


def somebody_there(workspace: str, run_id: str, config: RunConfig, model_id: str) -> list[bool]:
    """Of each control image, in the order of its shards: whether the builder sees a person, on any axis."""
    found: list[bool] = []
    for shard in plan_shards(workspace, run_id, config, model_id, PURPOSE):
        found += _somebody_in(shard)
    return found


def _somebody_in(shard: ArtifactRef) -> list[bool]:
    seen: dict[str, bool] = {}
    for row in read_artifact(attributes_of(shard, "builder"), "attributes"):
        seen[row["sample_id"]] = seen.get(row["sample_id"], False) or row["status"] not in NOBODY
    return [seen[row["sample_id"]] for row in read_artifact(shard, "samples")]
