"""How far builder and judge agree on the same images, and why images have no group: rows of two tables."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from popalign_core.assessment.agreement import agreement
from popalign_core.attributes import AXES
from popalign_core.classification import Status
from popalign_core.config import RunConfig
from popalign_core.population_counts import by_prompt
from popalign_core.seeds import derive_seed
from storage.tables import read_artifact
from tasks.classification import attributes_of
from tasks.labels import labelled_samples
from tasks.sampling import plan_shards

# Whose images the builder labels as well, where that is asked for.
PURPOSE = "evaluation"
Row = dict[str, object]


def only_for_agreement(purpose: str, role: str) -> bool:
    """Whether nothing else needs these labels, so that nothing stops for the want of them."""
    return role == "builder" and purpose == PURPOSE


@dataclass(frozen=True)
class Classified:
    """Images of one model and purpose. ids: of the classifiers, by role."""

    workspace: str
    run_id: str
    config: RunConfig
    model_id: str
    purpose: str
    ids: Mapping[str, str]

    def agreement_rows(self, split: str) -> list[Row]:
        """Cohen's kappa and the share of equal labels on every axis."""
        judged = by_prompt(self._labelled("judge"))
        built = {sample.sample_id: sample.cell for sample in self._labelled("builder")}
        rows: list[Row] = []
        for position, name in enumerate(self.config.expansion.axes):
            labels = {
                prompt: (
                    [sample.cell[position] for sample in own],
                    [built[sample.sample_id][position] for sample in own],
                )
                for prompt, own in judged.items()
            }
            # Not by model: before and after are then of the same drawn prompts.
            rng = np.random.default_rng(derive_seed(self.config.seed, "assessment", "agreement", split, name))
            found = agreement(AXES[name], labels, rng=rng, resamples=self.config.assessment.resamples)
            for measure, estimate in found.items():
                values = {key: getattr(estimate, key) for key in ("value", "low", "high", "n", "unknown")}
                identity = {**self._identity("judge", split), "builder_id": self.ids["builder"]}
                rows.append({**identity, "axis": name, "measure": measure, **values})
        return rows

    def status_rows(self, split: str, role: str) -> list[Row]:
        """How many images have which status, on every axis."""
        shards = plan_shards(self.workspace, self.run_id, self.config, self.model_id, self.purpose)
        found = [row for shard in shards for row in read_artifact(attributes_of(shard, role), "attributes")]
        counts = Counter((row["axis"], row["status"]) for row in found)
        rows: list[Row] = []
        for name in self.config.expansion.axes:
            n = sum(counts[name, str(status)] for status in Status)
            for status in Status:
                count = counts[name, str(status)]
                row = {"axis": name, "status": str(status), "count": count, "n": n}
                rows.append({**self._identity(role, split), **row, "share": count / n if n else float("nan")})
        return rows

    def _labelled(self, role: str):
        return labelled_samples(self.workspace, self.run_id, self.config, self.model_id, self.purpose, role)

    def _identity(self, role: str, split: str) -> Row:
        return {"run_id": self.run_id, "model_id": self.model_id, "judge_id": self.ids[role], "split": split}
