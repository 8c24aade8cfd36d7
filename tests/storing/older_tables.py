"""Each older version of a table as it was written, frozen: columns and rows do not follow `storage.schemas`.

Whoever raises a version adds the form that is left behind, and then writes the record of columns again:
`PYTHONPATH=$PWD python tests/storing/older_tables.py`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.schemas import TABLES, VERSIONS, schema

RECORD = Path(__file__).parent / "columns_of_versions.json"
# Of the run, as `runs` holds it.
CONFIG = '{"model":"emoji","model_lora":"loras/a","seed":3}'
TYPES = {"str": pa.string(), "i32": pa.int32(), "i64": pa.int64(), "f32": pa.float32(), "f64": pa.float64()}
TYPES["bool"] = pa.bool_()


@dataclass(frozen=True)
class Form:
    """A version of a table. columns: name, with ? where null was allowed, and type. rows: values in their order,
    without run_id.

    derived: values of new columns that follow from the rows; all other new columns become null. what: tells apart two
    forms of one version.
    """

    table: str
    version: int
    columns: str
    rows: list[tuple[Any, ...]]
    derived: dict[str, list[Any]] = field(default_factory=dict)
    what: str = ""

    @property
    def name(self) -> str:
        """Of the form; also of the run that wrote it, in the first column of its rows."""
        return f"{self.table}-{self.version}{self.what}"

    def schema(self) -> pa.Schema:
        pairs = [column.split(":") for column in self.columns.split()]
        fields = [pa.field(name.removesuffix("?"), TYPES[kind], name.endswith("?")) for name, kind in pairs]
        return pa.schema(fields, {"table": self.table, "version": str(self.version)})

    def write(self, folder: Path) -> None:
        columns = zip(*((self.name, *row) for row in self.rows), strict=True)
        arrays = [pa.array(list(values), kind.type) for values, kind in zip(columns, self.schema(), strict=True)]
        table = pa.Table.from_arrays(arrays, schema=self.schema())
        pq.write_table(table, folder / f"{self.table}.parquet", version="2.6", write_page_checksum=True)

    def rows_now(self) -> list[dict[str, Any]]:
        """What a reader should find after the migration."""
        kept = [dict(zip(self.schema().names, (self.name, *row), strict=True)) for row in self.rows]
        names = schema(self.table).names
        return [
            {name: self.derived[name][at] if name in self.derived else row.get(name) for name in names}
            for at, row in enumerate(kept)
        ]


MODELS = (
    "run_id:str model_id:str parent_model_id?:str objective:str adapter:str round:i32 seed:i64 steps:i32 beta:f64 "
    "natural_beta?:f64"
)
MODEL = ("round-1", None, "popalign", "lora", 1, 5, 30, 2.5, None)
TIMINGS = "run_id:str stage:str key:str seconds:f64 items:i64 device:str"
TIMING = ("sampling", "base.0", 1.5, 32, "cpu")
POPULATION = (1, "p1", "doctor")
FORMS = [
    Form(
        "populations",
        1,
        "run_id:str round:i32 population_id:str prompt_id:str side:str axis:str group:str count:i32 size:i32 "
        "unknown:i32",
        [
            *((*POPULATION, "preferred", "gender", group, 4, 8, 0) for group in ("woman", "man")),
            *((*POPULATION, "dispreferred", "gender", group, 8 * (group == "man"), 8, 0) for group in ("woman", "man")),
            *((*POPULATION, "preferred", "age", group, 2, 8, 2) for group in ("young", "adult", "old")),
            # Another population has the same axis: its rows are not of the first one's groups.
            *((1, "p2", "nurse", "preferred", "gender", group, 4, 8, 0) for group in ("woman", "man")),
        ],
        {"target": [0.5] * 4 + [0.3333333432674408] * 3 + [0.5] * 2},
    ),
    Form(
        "models",
        1,
        MODELS,
        [MODEL],
        {"base_model": ["emoji + loras/a"], "config_digest": ["16a897c4911389ac"], "data_run_id": ["models-1"]},
    ),
    Form(
        "models",
        2,
        f"{MODELS} base_model?:str base_digest?:str config_digest?:str data_run_id?:str",
        [(*MODEL, "sdxl", "0123456789abcdef", None, "another-run")],
    ),
    Form(
        "training_steps",
        1,
        "run_id:str model_id:str round:i32 step:i32 loss:f64 implicit_accuracy:f64 winner_margin:f64 loser_margin:f64 "
        "gradient_norm:f64 learning_rate:f64 pairs:i32",
        [("round-1", 1, step, 0.7, 0.5, 0.01, -0.01, 1.0, 1e-3, 8) for step in (1, 2)],
    ),
    Form(
        "validations",
        1,
        "run_id:str model_id:str round:i32 axis:str disparity:f64 floor:f64 selected:bool",
        [("round-1", 1, "gender", 0.25, 0.1, True)],
    ),
    Form(
        "disparities",
        1,
        "run_id:str model_id:str judge_id:str split:str prompt_id?:str level:str axis:str measure:str target:str "
        "value:f64 low:f64 high:f64 floor?:f64 n:i32 unknown:i32",
        [
            ("base", "judge", "eval", None, "mean", "gender", "l2", "uniform", 0.5, 0.4, 0.6, 0.1, 40, 2),
            ("base", "judge", "eval", "doctor", "prompt", "gender", "js", "uniform", 0.2, 0.1, 0.3, None, 20, 1),
        ],
    ),
    Form(
        "group_shares",
        1,
        "run_id:str model_id:str judge_id:str split:str prompt_id?:str axis:str group:str count:i32 n:i32 share:f64 "
        "low:f64 high:f64",
        [("base", "judge", "eval", None, "gender", group, 5, 10, 0.5, 0.24, 0.76) for group in ("woman", "man")],
        {"interval": ["wilson", "wilson"]},
    ),
    Form(
        "seed_summaries",
        1,
        "run_id:str judge_id:str axis:str seeds:i32 before:f64 mean:f64 deviation:f64 low:f64 high:f64 best:f64 "
        "worst:f64",
        [("judge", "gender", 3, 0.5, 0.2, 0.05, 0.08, 0.32, 0.15, 0.25)],
    ),
    Form("timings", 1, TIMINGS, [TIMING]),
    Form("timings", 2, f"{TIMINGS} peak_bytes?:i64", [(*TIMING, 4096), (*TIMING, None)], what="peak"),
    Form("timings", 2, f"{TIMINGS} ended_at?:str", [(*TIMING, "2026-11-26T12:00:00+00:00")], what="end"),
]


def columns_now() -> dict[str, str]:
    """By table: version, and a hash of the columns' names, types and whether they may be null."""
    found: dict[str, str] = {}
    for table in TABLES:
        lines = [f"{column.name} {column.type} {column.nullable}" for column in schema(table)]
        found[table] = f"{VERSIONS[table]} {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"
    return found


if __name__ == "__main__":
    RECORD.write_text(json.dumps(columns_now(), indent=1) + "\n", encoding="utf-8")
