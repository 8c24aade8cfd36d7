"""What work costs where nothing was measured yet: seconds and bytes, each with the sentence that says where from."""

from typing import NamedTuple

from popalign_core.config import AlignmentConfig
from popalign_core.models.checkpoints import EMBEDDED

# One SDXL UNet pass at 1024 x 1024: 6.87 TFLOP, at 430 TFLOP/s on one H100, at 0.5 TFLOP/s on a CPU.
_SDXL_PASS = {"gpu": 0.016, "cpu": 14.0}
_SDXL_SIDE = 1024
# Without TF32 an H100 does about an eighth of what it does in 16 bits.
_FLOAT32_FACTOR = {"gpu": 8.0, "cpu": 1.0}
# ViT-L/14 and the decoding of a lossless megapixel.
_SDXL_CLASSIFICATION = {"gpu": 0.05, "cpu": 0.5}
# Two CPU cores, run `demo-0` of 2026-11-25.
_EMOJI_PASS, _EMOJI_CLASSIFICATION, _EMOJI_PAIR = 0.0034, 0.0009, 0.030
_EMOJI_MEASUREMENT = _SDXL_MEASUREMENT = 0.009
_EMOJI_SIDE = 64
IMAGE_BYTES_PER_PIXEL = 1.5  # lossless WebP of a photograph-like picture
_ROW_BYTES_PER_IMAGE = 300
# Vectors of the builder's model in float32: 64 numbers; 768 of ViT-L/14, of the image and of a person in it.
_EMOJI_VECTOR_BYTES, _SDXL_VECTOR_BYTES = 4 * 64, 2 * 4 * 768
SDXL_UNET_PARAMETERS = 2_567_463_684
SDXL_CONDITIONING_PARAMETERS = 550_915_840
# Elements a rank on to_q, to_k, to_v and to_out.0: of all attention, and of cross-attention.
SDXL_LORA_PER_RANK = {"all": 1_451_520, "conditioning": 785_920}


class Cost(NamedTuple):
    """Seconds for one unit of work, and where the number comes from."""

    seconds: float
    source: str


def native_side(model: str) -> int:
    """Pixels a side that a model draws at where nothing else is asked for and its files are not here."""
    return _EMOJI_SIDE if model in EMBEDDED else _SDXL_SIDE


def table_bytes(model: str) -> int:
    """Bytes of all tables for one image, the image's own not among them."""
    return _ROW_BYTES_PER_IMAGE + (_EMOJI_VECTOR_BYTES if model in EMBEDDED else _SDXL_VECTOR_BYTES)


def place_of(model: str, device: str) -> str:
    """Device that a stated cost is for, "cpu" or "gpu": with device auto a large model is taken to have a GPU."""
    if device == "auto":
        return "cpu" if model in EMBEDDED else "gpu"
    return "cpu" if device == "cpu" else "gpu"


def sampling_cost(model: str, place: str, side: int, dtype: str, passes: int) -> Cost:
    """Of one image. passes: of the UNet."""
    return Cost(passes * _pass(model, place, side, dtype), _source(model, place))


def training_cost(model: str, place: str, side: int, dtype: str, alignment: AlignmentConfig) -> Cost:
    """Of one pair in a step: both images through policy (forward, twice that backward) and reference.

    Micro-batches take the policy forward once more, see `alignment.accumulation`.
    """
    if model in EMBEDDED:
        return Cost(_EMOJI_PAIR, _source(model, place))
    measured_first = 0 < alignment.micro_batch < alignment.pairs_per_step and alignment.objective not in ("dpo", "sft")
    passes = 2 * (4 + alignment.gradient_checkpointing + measured_first) * (2 if alignment.preserve_weight else 1)
    trained_in = dtype if alignment.lora_rank else "bfloat16" if alignment.mixed_precision else "float32"
    return Cost(passes * _pass(model, place, side, trained_in), _source(model, place))


def classification_cost(model: str, place: str) -> Cost:
    """Of one image by one classifier."""
    seconds = _EMOJI_CLASSIFICATION if model in EMBEDDED else _SDXL_CLASSIFICATION[place]
    return Cost(seconds, _source(model, place))


def measurement_cost(model: str, place: str) -> Cost:
    """Of the comparison, by image: features, intervals by resampling."""
    seconds = _EMOJI_MEASUREMENT if model in EMBEDDED else _SDXL_MEASUREMENT + _SDXL_CLASSIFICATION[place]
    return Cost(seconds, _source(model, place))


def _pass(model: str, place: str, side: int, dtype: str) -> float:
    if model in EMBEDDED:
        return _EMOJI_PASS * (side / _EMOJI_SIDE) ** 2
    factor = _FLOAT32_FACTOR[place] if dtype == "float32" else 1.0
    return _SDXL_PASS[place] * factor * (side / _SDXL_SIDE) ** 2


def _source(model: str, place: str) -> str:
    if model in EMBEDDED:
        return "stated default: measured on two CPU cores"
    return "stated default: one H100, by calculation" if place == "gpu" else "stated default: one CPU, by calculation"
