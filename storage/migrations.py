"""From each older version of a table to the next: what was added, and how far it follows from what is there.

Whoever raises a version in `storage.schemas` adds a step here; a test fails without one. A column that a step does not
set becomes null. `storage.rewriting` applies the steps to the files of a workspace.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from storage.columns import F32, STR
from storage.schemas import VERSIONS

# Rows as they are stored, and the run's configuration as JSON ("" where it is not known).
Change = Callable[[pa.Table, str], pa.Table]


@dataclass(frozen=True)
class Step:
    """One version up.

    words: what becomes of each column that the version added or changed. change: None = nothing is derived.
    """

    words: str
    change: Change | None = None


def _uniform_target(rows: pa.Table, _config: str) -> pa.Table:
    # Every group has a row, zeros included, so that rows count groups.
    keys = list(zip(*(rows[name].to_pylist() for name in ("round", "population_id", "side", "axis")), strict=True))
    groups = Counter(keys)
    shares = np.array([1 / groups[key] for key in keys], np.float32)
    return rows.append_column("target", pa.array(shares, F32))


def _lineage(rows: pa.Table, config: str) -> pa.Table:
    rows = rows.append_column("data_run_id", rows["run_id"])
    if not config:
        return rows
    values = cast("dict[str, Any]", json.loads(config))
    parts = (values.get(name) for name in ("model", "model_lora", "model_unet"))
    derived = {
        "base_model": " + ".join(str(part) for part in parts if part),
        "config_digest": hashlib.sha256(config.encode()).hexdigest()[:16],
    }
    for name, value in derived.items():
        rows = rows.append_column(name, pa.array([value] * len(rows), STR))
    return rows


def _wilson(rows: pa.Table, _config: str) -> pa.Table:
    return rows.append_column("interval", pa.array(["wilson"] * len(rows), STR))


STEPS: Mapping[tuple[str, int], Step] = {
    ("populations", 1): Step("target: the uniform share, the only target there was", _uniform_target),
    ("models", 1): Step(
        "base_model, config_digest: from the run's configuration; data_run_id: the run itself; base_digest: null, the "
        "weights were not hashed",
        _lineage,
    ),
    ("models", 2): Step("repeats_model_id: null, no training was repeated"),
    ("training_steps", 1): Step(
        "reward, drawn, unknown: null, the objective reward did not exist; implicit_accuracy, winner_margin, "
        "loser_margin: as they are, from now on they may be null"
    ),
    ("validations", 1): Step("quality: null, it was not measured"),
    ("disparities", 1): Step(
        "stratum: null, that level did not exist; null_low, null_high: null, they were not simulated"
    ),
    ("group_shares", 1): Step("interval: wilson, the only one there was", _wilson),
    ("seed_summaries", 1): Step("sampling, between, between_low, between_high: null, they were not computed"),
    ("timings", 1): Step("peak_bytes, ended_at: null, they were not measured"),
    # Two branches of development raised the version to 2, each with its own column.
    ("timings", 2): Step("of peak_bytes and ended_at, the one that is missing: null"),
}


def missing_steps(versions: Mapping[str, int] = VERSIONS) -> list[tuple[str, int]]:
    """Older versions of tables that no step leads on from."""
    needed = [(table, version) for table, current in versions.items() for version in range(1, current)]
    return [key for key in needed if key not in STEPS]


def migrated(table: str, version: int, rows: pa.Table, config: str) -> pa.Table:
    """Rows of an older version with what follows from them; columns that do not are still missing.

    config: the run's `config_json`; empty = not known.
    """
    for older in range(version, VERSIONS[table]):
        change = STEPS[table, older].change
        rows = rows if change is None else change(rows, config)
    return rows


def explanation(table: str, version: int) -> str:
    """In words, what becomes of an older version's columns."""
    return "; ".join(STEPS[table, older].words for older in range(version, VERSIONS[table]))
