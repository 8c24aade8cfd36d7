"""Tables of what people said of images: studies and their votes, audits of a classifier and what follows from them."""

import pyarrow as pa

from storage.columns import AXIS, F64, I32, JUDGE, MODEL, PROMPT, RUN, SAMPLE, SPLIT, STR, TableSpec

_DIGEST = ("page_digest", STR, "SHA-256 of all that the page shows and asks; a file of answers names it")
_STUDY = ("study_id", STR, "study, by the name it was made under")
_AUDIT = ("audit_id", STR, "audit, by the name it was made under")
_AUDITORS = ("auditors", I32, "people whose labels it rests on; the largest number is the newest")
_TRIAL = [
    ("trial_id", STR, "screen of the page, an opaque id"),
    ("level", STR, "population (grids of images) or single"),
    ("question", STR, "quality, match, diversity or evenness"),
    ("axis?", STR, "attribute that the question names; null for quality and match"),
    PROMPT,
    ("check", STR, "none; repeat: the pair again, sides exchanged; identical: the same images on both sides"),
    ("repeats?", STR, "trial that a repeat repeats"),
]

PEOPLE_TABLES: dict[str, TableSpec] = {
    "studies": (
        "one row a trial and side of a blinded study: the key that the page does not hold",
        [
            RUN,
            _STUDY,
            _DIGEST,
            *_TRIAL,
            ("option_id", STR, "side, an opaque id"),
            ("option_index", I32, "0 = A; every other rater sees the sides exchanged"),
            MODEL,
            ("sample_ids", pa.list_(STR), "images of the side"),
        ],
    ),
    "votes": (
        "one row an answer to a trial of a study",
        [
            RUN,
            _STUDY,
            ("rater", STR, "alias that the rater chose"),
            *_TRIAL,
            ("position", I32, "place in the rater's own order, from 0"),
            ("preferred_model_id?", STR, "model of the chosen side; null = no difference"),
            ("left_model_id", STR, "model that the rater saw as A"),
            ("seconds", F64, "on the screen until the answer"),
        ],
    ),
    "audit_samples": (
        "one row an image that people label, drawn at random within strata of what the judge said of it",
        [
            RUN,
            _AUDIT,
            _DIGEST,
            ("item_id", STR, "image on the page, an opaque id"),
            SAMPLE,
            MODEL,
            PROMPT,
            ("stratum", STR, "model and predicted outcome of every axis"),
            ("inclusion_probability", F64, "images drawn of the stratum / images in it"),
        ],
    ),
    "audits": (
        "one row an audited image, axis and auditor",
        [
            RUN,
            _AUDIT,
            ("auditor", STR, "alias that the auditor chose"),
            ("item_id", STR, "image on the page"),
            SAMPLE,
            MODEL,
            PROMPT,
            AXIS,
            ("label?", STR, "perceived group; null where status is not ok"),
            ("status", STR, "ok, cannot_tell or no_person"),
            ("seconds", F64, "on the screen until the answer; 0 where it followed from another one"),
        ],
    ),
    "confusion_matrices": (
        "one row an axis and cell: how images that people perceive as one thing are classified",
        [
            RUN,
            _AUDIT,
            _AUDITORS,
            JUDGE,
            AXIS,
            ("perceived", STR, "by people: a group or no person"),
            ("predicted", STR, "by the classifier: a group, no person or unknown"),
            ("count", I32, "audited images, unweighted"),
            ("n", I32, "audited images that people perceived so"),
            ("share", F64, "P(predicted given perceived), weighted by inclusion probability"),
            ("low", F64, "lower end of its 95% interval"),
            ("high", F64, "upper end of its 95% interval"),
        ],
    ),
    "corrected_shares": (
        "one row a model, axis, group and method: shares among people, corrected for the classifier's errors",
        [
            RUN,
            _AUDIT,
            _AUDITORS,
            MODEL,
            JUDGE,
            SPLIT,
            AXIS,
            ("group", STR, "group of the axis"),
            ("method", STR, "as_classified, post_stratified (the model's own audited images) or adjusted_count (all)"),
            ("share", F64, "among images with a person, all prompts together"),
            ("low", F64, "95% interval over prompts, images and audited labels"),
            ("high", F64, "95% interval over prompts, images and audited labels"),
            ("bound_low", F64, "were no image without a group of this one"),
            ("bound_high", F64, "were every image without a group of this one"),
            ("n", I32, "images of the model"),
            ("audited", I32, "audited images it rests on"),
        ],
    ),
}
