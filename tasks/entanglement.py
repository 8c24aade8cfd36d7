"""Rows about what changed outside the person, where persons were looked for."""

from collections.abc import Mapping

import numpy as np

from popalign_core.assessment.entanglement import entanglement, outside_change
from popalign_core.config import RunConfig
from popalign_core.detection import Found
from popalign_core.seeds import derive_seed
from storage.artifacts import ArtifactRef
from tasks.disparity_tables import Measured
from tasks.run import BASE
from tasks.stored_shard import StoredShard

Row = dict[str, object]


def entanglement_rows(
    identity: Mapping[str, object],
    config: RunConfig,
    shards: Mapping[str, list[ArtifactRef]],
    measured: Mapping[str, Measured],
) -> list[Row]:
    """shards, measured: by model, base first, of the same prompts and noise. None without `detection.persons`."""
    if not config.detection.persons:
        return []
    base, aligned = measured.values()
    pairs = zip(*shards.values(), strict=True)
    values = np.concatenate([_of_shard(StoredShard(a, config), StoredShard(b, config)) for a, b in pairs])
    rows: list[Row] = []
    for position, axis in enumerate(config.expansion.axes):
        before, after = ([sample.cell[position] for sample in side.samples] for side in (base, aligned))
        rng = np.random.default_rng(derive_seed(config.seed, "assessment", "entanglement", axis))
        found = entanglement(
            axis, values, before, after, base.prompt_ids, rng=rng, resamples=config.assessment.resamples
        )
        for one in found:
            known = one.estimate
            numbers = (known.value, known.low, known.high, known.n) if known else (None, None, None, 0)
            said = dict(zip(("value", "low", "high", "n"), numbers, strict=True))
            row = {"base_model_id": BASE, "axis": axis, "changed": one.changed, "left_out": one.left_out}
            rows.append({**identity, **row, **said})
    return rows


def _of_shard(base: StoredShard, aligned: StoredShard) -> np.ndarray:
    persons = [[_persons(found) for found in shard.found or []] for shard in (base, aligned)]
    return np.array(
        [
            outside_change(a, b, [*first, *second]) if first and second else np.nan
            for a, b, first, second in zip(base.images, aligned.images, *persons, strict=True)
        ]
    )


def _persons(found: Found):
    return found.persons or ()
