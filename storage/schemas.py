"""Every table: its columns, types and meaning. `docs/tables.md` is generated from here and a test keeps it true."""

import pyarrow as pa

from storage.errors import SchemaMismatch

STR, I32, I64, F32, F64 = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()
RUN = ("run_id", STR, "run that wrote the row")
MODEL = ("model_id", STR, "model that drew the image: base, round-1, ... aligned")
PROMPT = ("prompt_id", STR, "prompt, a hash of its text")
SAMPLE = ("sample_id", STR, "image: model/prompt/index")
SPLIT = ("split", STR, "train, validation or eval")
JUDGE = ("judge_id", STR, "classifier that said so, with the digest of its weights")
AXIS = ("axis", STR, "perceived attribute axis, or a crossed one joined by ' & '")
ROUND = ("round", I32, "round of alignment, from 1")
VALUES = [
    ("value", F64, "the measure's value"),
    ("low", F64, "lower end of its 95% interval"),
    ("high", F64, "upper end of its 95% interval"),
]
N = ("n", I32, "images counted: those with status ok")
CHECK = pa.struct(
    [("name", STR), ("passed", pa.bool_()), *((name, F64) for name in ("value", "low", "high", "threshold"))]
)
Column = tuple[str, pa.DataType, str]
TableSpec = tuple[str, list[Column]]

TABLES: dict[str, TableSpec] = {
    "runs": (
        "one row a run: what was asked for, and by which versions",
        [
            RUN,
            ("preset", STR, "preset the configuration started from"),
            ("config_json", STR, "the whole configuration as JSON"),
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
            ("kind", STR, "neutral, or specific (names a group)"),
            ("parent_id?", STR, "the neutral prompt of a specific one"),
            ("text", STR, "as given to the model"),
            ("prefix", STR, "beginning of the text, the same on both sides of a pair"),
            ("requested", pa.map_(STR, STR), "axis -> group that the text names"),
        ],
    ),
    "samples": (
        "one row an image",
        [
            RUN,
            MODEL,
            PROMPT,
            ("sample_index", I32, "position among the prompt's images"),
            SAMPLE,
            ("seed", I64, "seed of the initial noise"),
            ("width", I32, "pixels"),
            ("height", I32, "pixels"),
            ("image_sha256", STR, "hash of the stored bytes"),
            ("sampler_fingerprint", STR, "everything that can move a pixel, hashed"),
        ],
    ),
    "images": (
        "the bytes of each image, beside `samples`",
        [SAMPLE, ("image", pa.binary(), "lossless file"), ("format", STR, "webp")],
    ),
    "attributes": (
        "one row an image, axis and classifier; no image is left out",
        [
            RUN,
            MODEL,
            SAMPLE,
            PROMPT,
            ("classifier_id", STR, "who said so, with the digest of its weights"),
            AXIS,
            ("label?", STR, "perceived group; null where there is no person"),
            ("confidence", F32, "probability of the best group, 0 to 1"),
            ("probabilities", pa.list_(F32), "of every group, in the axis's order"),
            ("status", STR, "ok, low_confidence, no_person or error; only ok is counted"),
        ],
    ),
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
            ("weight", F32, "weight in the loss, mean 1 over a round"),
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
            ("objective", STR, "popalign, popalign_exact, dpo or sft"),
            ("adapter", STR, "full or lora"),
            ROUND,
            ("seed", I64, "seed of the training"),
            ("steps", I32, "steps of this round"),
            ("beta", F64, "strength of the pull to the reference, on mean squared error a latent element"),
            ("natural_beta?", F64, "the same in units of log-likelihood; null for sft"),
        ],
    ),
    "training_steps": (
        "one row a step",
        [
            RUN,
            MODEL,
            ROUND,
            ("step", I32, "finished steps of the round, from 1"),
            ("loss", F64, "with the anchor"),
            ("implicit_accuracy", F64, "share of pairs whose winner gained more on the reference than its loser"),
            ("winner_margin", F64, "mean gain of winners on the reference, mean squared error"),
            ("loser_margin", F64, "the same of losers"),
            ("gradient_norm", F64, "before clipping"),
            ("learning_rate", F64, "of this step"),
            ("pairs", I32, "pairs in the step"),
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
        ],
    ),
    "disparities": (
        "one row a model, prompt set, level, axis and measure",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            ("prompt_id?", STR, "null for mean and pooled"),
            ("level", STR, "prompt, mean (over prompts) or pooled"),
            AXIS,
            ("measure", STR, "see docs/method.md"),
            ("target", STR, "target distribution"),
            *VALUES,
            ("floor?", F64, "sampling floor sqrt((1 - 1/K) / n) where the measure is l2"),
            N,
            ("unknown", I32, "images without a group"),
        ],
    ),
    "group_shares": (
        "one row a model, prompt, axis and group",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            ("prompt_id?", STR, "null = pooled over prompts"),
            AXIS,
            ("group", STR, "group of the axis"),
            ("count", I32, "images"),
            N,
            ("share", F64, "count / n"),
            ("low", F64, "Wilson interval, 95%"),
            ("high", F64, "Wilson interval, 95%"),
        ],
    ),
    "comparisons": (
        "one row a split, axis and measure: aligned against base, paired over prompts",
        [
            RUN,
            ("base_model_id", STR, "before"),
            MODEL,
            JUDGE,
            SPLIT,
            AXIS,
            ("measure", STR, "l2, clip_score, obedience ..."),
            ("before", F64, "mean before"),
            ("after", F64, "mean after"),
            ("difference", F64, "after - before"),
            ("difference_low", F64, "95% interval, paired over prompts"),
            ("difference_high", F64, "95% interval, paired over prompts"),
            ("ratio", F64, "after / before"),
            ("ratio_low", F64, "95% interval, paired over prompts"),
            ("ratio_high", F64, "95% interval, paired over prompts"),
        ],
    ),
    "scores": (
        "one row a model, prompt set and quality measure",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            ("kind", STR, "neutral or specific prompts"),
            ("measure", STR, "clip_score, frechet_distance, obedience:<axis> ..."),
            ("unit", STR, "of value, low and high"),
            *VALUES,
            N,
        ],
    ),
    "decisions": (
        "one row a finished run",
        [
            RUN,
            ("base_model_id", STR, "model compared with"),
            MODEL,
            ("verdict", STR, "promote or hold"),
            ("reason", STR, "in one sentence"),
            ("checks", pa.list_(CHECK), "every condition with its value, interval and threshold"),
        ],
    ),
    "timings": (
        "one row a piece of work; not part of a run's identity",
        [
            RUN,
            ("stage", STR, "stage"),
            ("key", STR, "piece"),
            ("seconds", F64, "wall time"),
            ("items", I64, "images, rows or steps"),
            ("device", STR, "cpu, cuda ..."),
        ],
    ),
}


def schema(table: str) -> pa.Schema:
    """The Arrow schema of a table, with comments in the fields' metadata. Raises: SchemaMismatch."""
    if table not in TABLES:
        raise SchemaMismatch(f"there is no table {table!r}; there are {', '.join(TABLES)}.")
    fields = [
        pa.field(name.removesuffix("?"), kind, nullable=name.endswith("?"), metadata={"comment": comment})
        for name, kind, comment in TABLES[table][1]
    ]
    return pa.schema(fields, metadata={"table": table, "version": "1"})


def document() -> str:
    """`docs/tables.md`: every table with its columns, types and meaning."""
    lines = [
        "# Tables",
        "",
        "Parquet, schema version 1. Generated by `storage.schemas.document`; `?` marks a column",
        "",
    ]
    lines[2] += " that may be null."
    for name, (comment, columns) in TABLES.items():
        lines += [
            f"## {name}",
            "",
            f"{comment[0].upper()}{comment[1:]}.",
            "",
            "| column | type | meaning |",
            "|---|---|---|",
        ]
        lines += [f"| {column} | {kind} | {text} |" for column, kind, text in columns]
        lines.append("")
    return "\n".join(lines)
