"""Types and columns that tables share, and the units of numbers."""

import pyarrow as pa

STR, I32, I64, F32, F64 = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()
RUN = ("run_id", STR, "run that wrote the row")
MODEL = ("model_id", STR, "model that drew the image: base, round-1, round-2 ...")
PROMPT = ("prompt_id", STR, "prompt, a hash of its text")
SAMPLE = ("sample_id", STR, "image: model/prompt/index")
REGION = ("region", I32, "0 = the whole image; else the position of a face or person, from 1, the largest first")
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

# By column: a name has one unit in all tables. "1" is a number without a unit. MSE: mean squared error of the predicted
# noise, a latent element.
UNITS = {
    "sample_index": "index",
    "seed": "1",
    "width": "px",
    "height": "px",
    "region": "index",
    **dict.fromkeys(("left", "top", "right", "bottom"), "px"),
    "confidence": "probability",
    "vector": "1",
    "probabilities": "probability",
    "round": "index",
    "count": "images",
    "images": "images",
    "left_out": "images",
    "half_width": "1",
    **dict.fromkeys(("overall", "overall_low", "overall_high", "group_min", "group_max"), "1"),
    "groups": "groups",
    **dict.fromkeys(("n_base", "n_aligned"), "images"),
    "n_boot": "resamples",
    "wanted": "1",
    "target": "share",
    "size": "images",
    "unknown": "images",
    "weight": "1",
    "drawn": "images",
    "kept": "images",
    "steps": "steps",
    "beta": "1/MSE",
    "natural_beta": "1",
    "step": "index",
    "loss": "of the objective",
    "implicit_accuracy": "share",
    "winner_margin": "MSE",
    "loser_margin": "MSE",
    "gradient_norm": "1",
    "learning_rate": "1",
    "pairs": "pairs",
    "reward": "1",
    "disparity": "1",
    "quality": "100 x cosine",
    "seed_index": "index",
    "seeds": "seeds",
    "mean": "1",
    "deviation": "1",
    "sampling": "1",
    "between": "1",
    "between_low": "1",
    "between_high": "1",
    "best": "1",
    "worst": "1",
    "peak_bytes": "bytes",
    "floor": "1",
    "value": "of `measure`",
    "low": "of the estimate",
    "high": "of the estimate",
    "n": "images",
    "share": "share",
    "before": "of `measure`",
    "after": "of `measure`",
    "difference": "of `measure`",
    "difference_low": "of `measure`",
    "difference_high": "of `measure`",
    "ratio": "1",
    "ratio_low": "1",
    "ratio_high": "1",
    "checks": "of the check",
    "shape": "elements",
    "option_index": "index",
    "position": "index",
    "inclusion_probability": "probability",
    "auditors": "people",
    "bound_low": "share",
    "bound_high": "share",
    "audited": "images",
    "exact": "of `measure`",
    "fast": "of `measure`",
    "lost": "pairs",
    "gained": "pairs",
    "flip_rate": "share",
    "flip_low": "share",
    "flip_high": "share",
    "p_value": "probability",
    "null_low": "of `measure`",
    "null_high": "of `measure`",
    "null_mean": "of `measure`",
    "p_holm": "probability",
    "p_benjamini_hochberg": "probability",
    "changed": "pairs",
    "seconds": "s",
    "items": "images, rows or steps",
    "ours": "of `unit`",
    "peer": "of `unit`",
    "repetitions": "repetitions",
    "spread": "share",
}
