"""Tables of image quality: what was scored, by whom, and how far the models' images are from each other."""

import pyarrow as pa

from storage.columns import AXIS, F64, I32, JUDGE, MODEL, RUN, SPLIT, STR, VALUES, N, TableSpec

QUALITY_TABLES: dict[str, TableSpec] = {
    "scores": (
        "one row a model, prompt set and quality measure",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            ("kind", STR, "neutral or specific prompts, or controls: fact, no_person"),
            ("measure", STR, "clip_score, paired_similarity, pickscore ..., obedience:<axis>"),
            ("unit", STR, "of value, low and high"),
            *VALUES,
            N,
        ],
    ),
    "group_diversities": (
        "one row a model, axis and group of held-out or trained prompts: how unlike the group's images are",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            AXIS,
            ("group", STR, "group of the axis, as perceived by the judge"),
            ("features_id", STR, "classifier whose features are compared, with the digest of its weights"),
            ("value?", F64, "Vendi score, mean over subsets: effective number of unlike images; null below 2 images"),
            ("low?", F64, "2.5% of the subsets' scores: how steady, not how certain"),
            ("high?", F64, "97.5% of them"),
            N,
            ("size", I32, "images of a subset, the same for both models"),
        ],
    ),
    "group_scores": (
        "one row a model, quality measure and perceived group: whether one group's images are worse than another's",
        [
            RUN,
            MODEL,
            JUDGE,
            SPLIT,
            ("measure", STR, "as in `scores`"),
            ("unit", STR, "of value, low and high"),
            ("scorer_id", STR, "who scored, with the digest of its weights"),
            AXIS,
            ("group", STR, "group of the axis, as perceived by the judge"),
            ("value?", F64, "mean over the group's images; null without one"),
            ("low?", F64, "lower end of its 95% interval, over prompts"),
            ("high?", F64, "upper end of it"),
            N,
        ],
    ),
    "distances": (
        "one row a split and distance: how far the aligned model's images are from the base's, same prompts and noise",
        [
            RUN,
            ("base_model_id", STR, "before"),
            MODEL,
            ("features_id", STR, "network whose features are compared, with the digest of its weights"),
            SPLIT,
            ("measure", STR, "frechet_to_base (builder's features), fd_dinov2, fid, kid, cmmd (x 1000)"),
            ("value", F64, "distance between the two sets of images"),
            ("null_mean", F64, "mean of 19 values with the sides swapped pair by pair at random"),
            ("null_high", F64, "largest of them: passed once in 20 times by models that draw alike"),
            ("n", I32, "images a side"),
        ],
    ),
    "entanglements": (
        "two rows a split and axis, where persons were looked for: how much changed outside of them, same noise",
        [
            RUN,
            ("base_model_id", STR, "before"),
            MODEL,
            JUDGE,
            SPLIT,
            AXIS,
            ("changed", pa.bool_(), "of pairs whose perceived group differs; false: of those whose group is the same"),
            ("value?", F64, "mean absolute difference of the pixels outside all persons, 0 to 1; null without a pair"),
            ("low?", F64, "lower end of its 95% interval, over prompts"),
            ("high?", F64, "upper end of it"),
            ("n", I32, "pairs"),
            ("left_out", I32, "pairs without a group or a person on a side, or that are nearly all person"),
        ],
    ),
}
