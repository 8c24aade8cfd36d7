"""Every table: its columns, types and meaning. `docs/tables.md` is generated from here and a test keeps it true."""

import pyarrow as pa

from storage.assessment_schemas import ASSESSMENT_TABLES
from storage.columns import (
    AXIS,
    F32,
    F64,
    I32,
    I64,
    MODEL,
    PROMPT,
    ROUND,
    RUN,
    SPLIT,
    STR,
    UNITS,
    TableSpec,
)
from storage.errors import SchemaMismatch
from storage.image_schemas import IMAGE_TABLES
from storage.people_schemas import PEOPLE_TABLES
from storage.quality_schemas import QUALITY_TABLES

TABLES: dict[str, TableSpec] = {
    "runs": (
        "one row a run: what was asked for",
        [
            RUN,
            ("preset", STR, "preset the configuration started from"),
            ("config_json", STR, "the whole configuration as JSON"),
        ],
    ),
    "starts": (
        "one row each time that a run was started or went on: when, and with which versions",
        [
            RUN,
            ("started_at", STR, "UTC"),
            ("versions_json", STR, "library versions as JSON"),
        ],
    ),
    "prompts": (
        "one row a prompt",
        [
            RUN,
            PROMPT,
            SPLIT,
            ("suite", STR, "prompt set it comes from"),
            ("subject", STR, "who is depicted"),
            ("kind", STR, "neutral, specific (names a group), or a control: fact, no_person"),
            ("parent_id?", STR, "the neutral prompt of a specific one"),
            ("text", STR, "as given to the model"),
            ("prefix", STR, "beginning of the text, the same on both sides of a pair"),
            ("requested", pa.map_(STR, STR), "axis -> group that the text names, or that is a fact of who is depicted"),
        ],
    ),
    **IMAGE_TABLES,
    "populations": (
        "one row a population, axis and group, zeros included",
        [
            RUN,
            ROUND,
            ("population_id", STR, "population"),
            PROMPT,
            ("side", STR, "preferred or dispreferred"),
            AXIS,
            ("group", STR, "group of the axis"),
            ("count", I32, "images perceived as the group"),
            ("target?", F32, "share aimed at: the uniform one, or past it by populations.overshoot"),
            ("size", I32, "images in the population"),
            ("unknown", I32, "images without a group on this axis"),
        ],
    ),
    "preferences": (
        "one row a pair of images under the neutral caption",
        [
            RUN,
            ROUND,
            ("pair_id", STR, "pair"),
            ("population_id", STR, "populations that the two images belong to"),
            PROMPT,
            ("caption", STR, "the neutral prompt's text"),
            ("winner_sample_id", STR, "image of the preferred population"),
            ("loser_sample_id", STR, "image of the dispreferred population"),
            ("weight", F32, "weight in the loss, above 0; what its mean is depends on the weighting"),
        ],
    ),
    "refusals": (
        "prompts for which no preference could be built",
        [RUN, ROUND, PROMPT, ("reason", STR, "tie, preferred_not_more_even, ..."), ("detail", STR, "in words")],
    ),
    "yields": (
        "one row a round, prompt and requested cell: what became of the identity-specific images",
        [
            RUN,
            ROUND,
            PROMPT,
            ("group", STR, "requested cell of the crossed axis"),
            ("drawn", I32, "images"),
            ("kept", I32, "perceived as requested"),
            ("unknown", I32, "without a group on some axis"),
        ],
    ),
    "models": (
        "one row a model; its weights lie beside the table",
        [
            RUN,
            MODEL,
            ("parent_model_id?", STR, "model it was trained from"),
            ("objective", STR, "popalign, popalign_exact, dpo, sft or reward"),
            ("adapter", STR, "full or lora"),
            ROUND,
            ("seed", I64, "seed of the training"),
            ("steps", I32, "optimizer steps from the parent"),
            ("beta", F64, "strength of the pull to the reference, on mean squared error a latent element"),
            ("natural_beta?", F64, "the same in units of log-likelihood; null for sft and reward"),
            ("base_model?", STR, "base model as configured: pipeline + LoRA + UNet, as far as there are any"),
            ("base_digest?", STR, "digest of the base model's weights; of a hub id, of its name"),
            ("config_digest?", STR, "first 16 hex digits of the SHA-256 of the run's `config_json`"),
            ("data_run_id?", STR, "run that drew the images it was trained on"),
            ("repeats_model_id?", STR, "model that it was trained like, with another training seed"),
        ],
    ),
    "training_steps": (
        "one row a step",
        [
            RUN,
            MODEL,
            ROUND,
            ("step", I32, "finished steps of the training that the model belongs to, from 1"),
            ("loss", F64, "with the anchor"),
            ("implicit_accuracy?", F64, "share of pairs whose winner gained more on the reference than its loser"),
            ("winner_margin?", F64, "mean gain of winners on the reference, mean squared error"),
            ("loser_margin?", F64, "the same of losers"),
            ("gradient_norm", F64, "before clipping"),
            ("learning_rate", F64, "of this step"),
            ("pairs", I32, "pairs in the step; 0 for reward, which has none and so no margins"),
            ("reward?", F64, "of reward alone: mean of the images drawn for the step"),
            ("drawn?", I32, "of reward alone: images drawn for the step"),
            ("unknown?", I32, "of these without a group on some axis"),
        ],
    ),
    "validations": (
        "one row a round and axis: held-out disparity measured during training, by the builder's classifier",
        [
            RUN,
            MODEL,
            ROUND,
            AXIS,
            ("disparity", F64, "mean over validation prompts of the L2 discrepancy"),
            ("floor", F64, "what an even population of this size would show"),
            ("selected", pa.bool_(), "whether this model was kept"),
            (
                "quality?",
                F64,
                "mean CLIP score of the same images, where alignment.max_quality_drop is set",
            ),
        ],
    ),
    **ASSESSMENT_TABLES,
    **QUALITY_TABLES,
    **PEOPLE_TABLES,
    "timings": (
        "one row a piece of work; not part of a run's identity",
        [
            RUN,
            ("stage", STR, "stage"),
            ("key", STR, "piece"),
            ("seconds", F64, "wall time"),
            ("items", I64, "images, rows or steps"),
            ("device", STR, "cpu, cuda ..."),
            ("peak_bytes?", I64, "most memory during a training: of the process on a CPU, allocated on a GPU"),
            ("ended_at?", STR, "UTC, by the clock of the host that did it"),
        ],
    ),
    "benchmarks": (
        "one row a benchmark and time that it was run, in a workspace of their own (`make bench`)",
        [
            RUN,
            ("name", STR, "what was measured"),
            ("unit", STR, "of ours and peer; in one that ends in /s more is better, in any other less"),
            ("ours", F64, "median of the repetitions"),
            ("peer?", F64, "the same of what it is compared with"),
            ("peer_name?", STR, "what it is compared with"),
            ("ratio?", F64, "how many times better ours is: median over repetitions, each against the peer beside it"),
            ("repetitions", I32, "how often each was measured, in turn"),
            ("spread", F64, "of the ratio, without a peer of ours: largest less smallest, by the median"),
            ("device", STR, "name of the processor, or of the accelerator"),
            ("driver", STR, "of the accelerator; empty for a processor"),
            ("versions_json", STR, "library versions as JSON"),
            ("commit", STR, "of the checkout; + where it was edited"),
            ("settings_json", STR, "sizes and settings of the measurement as JSON"),
            ("measured_at", STR, "UTC"),
        ],
    ),
}

# Tables that lie in another table's artifacts, written in the same commit.
FOLDER = {
    "images": "samples",
    "latents": "samples",
    "region_attributes": "attributes",
    "preferences": "populations",
    "refusals": "populations",
    "yields": "populations",
    "training_steps": "models",
    "seed_summaries": "seeds",
    "group_shares": "disparities",
    "comparisons": "disparities",
    "scores": "disparities",
    "agreements": "disparities",
    "status_counts": "disparities",
    "target_shares": "disparities",
    "prompt_changes": "disparities",
    "group_diversities": "disparities",
    "group_scores": "disparities",
    "group_gaps": "disparities",
    "group_distances": "disparities",
    "distances": "disparities",
    "entanglements": "disparities",
    "confusion_matrices": "corrected_shares",
}
# Raised with every change of a table's columns, with a step in `storage.migrations` that takes older files along. A
# column that is added must be nullable, or older files are refused until they are migrated.
VERSIONS = dict.fromkeys(TABLES, 1) | {
    "disparities": 2,
    "group_shares": 2,
    "populations": 2,
    "seed_summaries": 2,
    "models": 3,
    "timings": 3,
    "training_steps": 2,
    "validations": 2,
}


def schema(table: str) -> pa.Schema:
    """The Arrow schema of a table, with comments and units in the fields' metadata. Raises: SchemaMismatch."""
    if table not in TABLES:
        raise SchemaMismatch(f"there is no table {table!r}; there are {', '.join(TABLES)}.")
    fields = [
        pa.field(
            name.removesuffix("?"),
            kind,
            nullable=name.endswith("?"),
            metadata={"comment": comment, "unit": UNITS.get(name.removesuffix("?"), "")},
        )
        for name, kind, comment in TABLES[table][1]
    ]
    return pa.schema(fields, metadata={"table": table, "version": str(VERSIONS[table])})


_HEADER = """# Tables

A workspace is a folder of runs. Every table is the union of the Parquet files
`runs/<run_id>/<folder>/<key>/<table>.parquet` whose folder holds a `manifest.json`; a folder without one was never
finished and is no data. `catalog.duckdb` in the workspace has a view of each table over all runs, with these
comments: `popalign sql "SHOW TABLES"`, or open it with any DuckDB client. The views name absolute paths: after moving
a workspace, any `popalign sql` or `popalign catalog rebuild` writes the catalog again. The view `images` has the
column run_id as well. Ready questions are macros of the catalog: see [queries.md](queries.md). One more view,
`model_registry`, has a row a trained model: what it was made from, what was decided and measured, and whether it is
the promoted one.

A `?` after a column's name: it may be null. Unit `1`: a number without one. `MSE`: mean squared error of the predicted
noise, a latent element. This file is written by `storage.schemas.document`, and a test keeps it true.
"""


def document() -> str:
    """`docs/tables.md`: every table with its columns, types, units and meanings."""
    return "\n".join([_HEADER, *(_section(name) for name in TABLES)])


def _section(name: str) -> str:
    comment, columns = TABLES[name]
    lines = [
        f"## {name}",
        "",
        f"{comment[0].upper()}{comment[1:]}. Folder `{FOLDER.get(name, name)}`, version {VERSIONS[name]}.",
        "",
        "| column | type | unit | meaning |",
        "|---|---|---|---|",
    ]
    for column, kind, meaning in columns:
        lines.append(f"| {column} | {kind} | {UNITS.get(column.removesuffix('?'), '')} | {meaning} |")
    return "\n".join([*lines, ""])
