"""Tables of images: how they were drawn, and what is perceived in them."""

import pyarrow as pa

from storage.columns import (
    AXIS,
    F32,
    I32,
    I64,
    MODEL,
    PROMPT,
    REGION,
    ROUND,
    RUN,
    SAMPLE,
    STR,
    TableSpec,
)

IMAGE_TABLES: dict[str, TableSpec] = {
    "counterfactuals": (
        "one row an image that is drawn again as another group, from the same noise",
        [
            RUN,
            ROUND,
            PROMPT,
            ("own_sample_id", STR, "the model's own image of the neutral prompt"),
            SAMPLE,
            ("target_prompt_id", STR, "the specific prompt that names the wanted groups"),
            ("sample_index", I32, "position among the prompt's images; with the family it decides the noise"),
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
    "latents": (
        "what each image was decoded from, beside `samples`, where `sampling.keep_latents` is on",
        [
            SAMPLE,
            ("latents", pa.binary(), "little-endian values in the order of the shape, scaled as the UNet knows them"),
            ("shape", pa.list_(I32), "channels, height, width"),
            ("dtype", STR, "float32, float16, or bfloat16"),
        ],
    ),
    "samplers": (
        "one row a sampler fingerprint: what it stands for",
        [
            RUN,
            ("sampler_fingerprint", STR, "of rows in `samples`"),
            ("facts", pa.map_(STR, STR), "everything that can move a pixel, as it was in effect"),
        ],
    ),
    "sampler_differences": (
        "one row a fact in which images that were compared or mixed were drawn differently; none is the rule",
        [
            RUN,
            ("compared", STR, "populations of a round, or the assessment of a model"),
            ("fact", STR, "key of `samplers.facts`; the model itself is left out"),
            ("values", pa.list_(STR), "its values, each once"),
        ],
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
            ("label?", STR, "perceived group; null unless the status is ok or low_confidence"),
            ("confidence", F32, "probability of the best group, 0 to 1"),
            ("probabilities", pa.list_(F32), "of every group, in the axis's order"),
            ("status", STR, "ok, low_confidence, no_person, no_face, several or error; only ok is counted"),
        ],
    ),
    "region_attributes": (
        "one row a face or person, axis and classifier, where a detector is configured; `attributes` has the image's",
        [
            RUN,
            MODEL,
            SAMPLE,
            PROMPT,
            ("classifier_id", STR, "who said so, with the digest of its weights"),
            REGION,
            AXIS,
            ("label?", STR, "perceived group; null unless the status is ok or low_confidence"),
            ("confidence", F32, "probability of the best group, 0 to 1"),
            ("probabilities", pa.list_(F32), "of every group, in the axis's order"),
            ("status", STR, "ok, low_confidence, no_person or error"),
        ],
    ),
    "detections": (
        "one row a person or face that was found, where a detector is configured; images without have no row",
        [
            RUN,
            MODEL,
            SAMPLE,
            ("detector_id", STR, "who found it, with the digest of its weights"),
            ("kind", STR, "person or face"),
            REGION,
            ("left", I32, "edge of the box"),
            ("top", I32, "edge of the box"),
            ("right", I32, "edge of the box, exclusive"),
            ("bottom", I32, "edge of the box, exclusive"),
            ("confidence", F32, "the detector's"),
        ],
    ),
    "embeddings": (
        "one row an image (and face or person) as the builder's model sees it: a further axis needs no images",
        [
            RUN,
            MODEL,
            SAMPLE,
            REGION,
            ("embedder_id", STR, "model of the vector, with the digest of its weights"),
            ("vector", pa.list_(F32), "unit features"),
        ],
    ),
    "image_scores": (
        "one row an image and scorer, where `quality.scorers` names one that gives numbers",
        [
            RUN,
            MODEL,
            SAMPLE,
            PROMPT,
            ("scorer_id", STR, "who said so, with the digest of its weights"),
            ("measure", STR, "kind of scorer"),
            ("value", F32, "its score, in the unit that `scores` names"),
        ],
    ),
    "image_features": (
        "one row an image as a network of `quality.scorers` sees it: sets of images are compared in these",
        [
            RUN,
            MODEL,
            SAMPLE,
            REGION,
            ("embedder_id", STR, "network of the vector, with the digest of its weights"),
            ("vector", pa.list_(F32), "features"),
        ],
    ),
}
