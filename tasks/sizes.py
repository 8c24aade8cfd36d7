"""What a run takes on disk: images, tables, weights and checkpoints, as earlier runs took or as their files tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from popalign_core.config import RunConfig
from popalign_core.models.architecture import ArchitectureUnknown, architecture_of, sdxl_as_shipped
from popalign_core.models.checkpoints import check_pipeline_folder, resolve_source
from popalign_core.models.families import SDXL
from popalign_core.models.sdxl import DTYPES
from popalign_core.stated_costs import (
    IMAGE_BYTES_PER_PIXEL,
    SDXL_CONDITIONING_PARAMETERS,
    SDXL_LORA_PER_RANK,
    SDXL_UNET_PARAMETERS,
    native_side,
)
from storage.artifacts import committed_keys, read_manifest
from tasks.rates import Record, flat_config

FLOAT32_BYTES = 4
IMAGES = "images.parquet"
ADAPTED = {
    "unet": {"all": ("to_q", "to_k", "to_v", "to_out.0"), "conditioning": ("to_q", "to_k", "to_v", "to_out.0")},
    "transformer": {
        "all": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "conditioning": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    },
}
# Enough to tell a mean by; a long run has many thousands.
MOST_ARTIFACTS = 100


@dataclass(frozen=True)
class Size:
    """Bytes of one unit, and where the number comes from."""

    bytes: float
    source: str


@dataclass(frozen=True)
class ModelSize:
    """Elements of a denoiser that are saved with a trained model, and those that are trained; both in float32."""

    saved: float
    trained: float
    source: str

    @property
    def bytes(self) -> float:
        """Of the weights of one trained model."""
        return FLOAT32_BYTES * self.saved


def image_size(records: Sequence[Record], config: RunConfig) -> Size:
    """Of one image: from the last run of the same model and image size, removed images included; else by pixels."""
    wanted = flat_config(config.model_dump(mode="json"))
    for record in records:
        if record.agrees(wanted, ("model", "sampling.image_size")):
            items = {piece.key: piece.items for piece in record.pieces if piece.stage == "sampling"}
            images = total = 0
            for ref in committed_keys(record.place, record.run_id, "samples")[:MOST_ARTIFACTS]:
                entry = read_manifest(ref).files.get(IMAGES)
                count = items.get(f"{ref.table}/{ref.key}", 0)
                if entry is not None and count:
                    images, total = images + count, total + entry.bytes
            if images:
                return Size(total / images, f"measured: {total / images:,.0f} B an image, run {record.run_id}")
    side = config.sampling.image_size or native_side(config.model)
    size = IMAGE_BYTES_PER_PIXEL * side**2
    return Size(size, f"stated default: {size:,.0f} B an image of {side} x {side}")


def latents_size(config: RunConfig) -> Size:
    """Of the latents of one image, where they are kept: noise hardly compresses. SDXL's for a model not known here."""
    sampling, how = config.sampling, "by calculation"
    try:
        model = architecture_of(config.model)
    except ArchitectureUnknown:
        model, how = sdxl_as_shipped(), "stated default"
    size = model.latent_elements(sampling.image_size) * DTYPES[sampling.dtype].itemsize
    return Size(size, f"{how}: {size:,} B an image, {model.source}")


def model_size(config: RunConfig) -> ModelSize:
    """Of one trained model: from the denoiser's files where they are here, else SDXL's."""
    pipeline = Path(resolve_source(config.model))
    family = check_pipeline_folder(pipeline) if pipeline.is_dir() else SDXL
    folder = pipeline / family.denoiser
    rank, part = config.alignment.lora_rank, config.alignment.trainable
    if not any(folder.glob("*.safetensors")):
        if rank:
            elements = rank * SDXL_LORA_PER_RANK[part]
            return ModelSize(elements, elements, f"stated default: a LoRA of SDXL with rank {rank}")
        trained = SDXL_UNET_PARAMETERS if part == "all" else SDXL_CONDITIONING_PARAMETERS
        return ModelSize(SDXL_UNET_PARAMETERS, trained, "stated default: SDXL's UNet")
    shapes = _shapes(folder)
    chosen = {n: s for n, s in shapes.items() if part == "all" or any(w in f".{n}" for w in family.conditioning)}
    if rank:
        ends = tuple(f"{layer}.weight" for layer in ADAPTED[family.denoiser][part])
        elements = rank * sum(sum(shape) for name, shape in chosen.items() if name.endswith(ends))
        return ModelSize(elements, elements, f"from the model's files: a LoRA with rank {rank}")
    return ModelSize(_elements(shapes), _elements(chosen), "from the model's files")


def checkpoint_bytes(config: RunConfig, size: ModelSize) -> float:
    """The most that checkpoints of a training take at once: they go when it ends.

    One has the trained weights and AdamW's two moments, and the moving average if kept; a new one is written before the
    old one goes.
    """
    alignment = config.alignment
    whole = alignment.steps if alignment.redraw else alignment.rounds * alignment.steps
    written = whole // alignment.checkpoint_steps + (0 if alignment.redraw else alignment.rounds)
    copies = 3 + (alignment.ema_decay is not None)
    return min(2, written) * copies * FLOAT32_BYTES * size.trained


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _elements(shapes: dict[str, tuple[int, ...]]) -> float:
    return float(sum(prod(shape) for shape in shapes.values()))
