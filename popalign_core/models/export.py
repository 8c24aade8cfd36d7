"""Weights for others: what a trained model has to be handed over as, so that plain diffusers opens it."""

import shutil
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open

from popalign_core.errors import ModelNotUsable
from popalign_core.models.families import DenoiserPart
from popalign_core.models.loading import family_of, load_model
from popalign_core.models.lora import FILE_NAME
from popalign_core.models.sdxl import ModelSource
from popalign_core.models.text_to_image import TextToImageModel

Form = Literal["lora", "unet", "transformer", "pipeline"]


def export_form(source: ModelSource) -> Form:
    """An adapter on a plain pipeline is handed over alone, everything else as a whole UNet or transformer.

    Only where the base model's LoRA also changes the text encoders, it takes the whole pipeline.
    Raises: ModelNotUsable.
    """
    if source.fused_lora is not None and adapts_text_encoders(source.fused_lora):
        return "pipeline"
    if source.lora is not None and source.unet is None and source.fused_lora is None:
        return "lora"
    return family_of(source.pipeline).denoiser


def export_weights(source: ModelSource, folder: Path) -> Form:
    """Writes a trained model into an existing folder: a LoRA file, `unet/`, `transformer/`, or a pipeline.

    All in safetensors.

    Raises: ModelNotUsable.
    """
    form = export_form(source)
    if form == "lora":
        shutil.copyfile(Path(str(source.lora)) / FILE_NAME, folder / FILE_NAME)
    elif form == "pipeline":
        _merged(source).pipeline.save_pretrained(folder, safe_serialization=True)
    elif source.lora is None:
        shutil.copytree(str(source.unet), folder / form)
    else:
        save_merged_denoiser(source, folder)
    return form


def save_merged_denoiser(source: ModelSource, folder: Path) -> DenoiserPart:
    """Writes `unet/` or `transformer/` with the adapter in its weights, which then loads as any other.

    Raises: ModelNotUsable.
    """
    model = _merged(source)
    part = model.family.denoiser
    model.network.save_pretrained(folder / part, safe_serialization=True)
    return part


def _merged(source: ModelSource) -> TextToImageModel:
    # In float32: in fewer bits the sum would lose most of what an adapter adds.
    model = load_model(source, device="cpu", dtype="float32")
    if source.lora is not None:
        model.pipeline.fuse_lora(components=[model.family.denoiser])
        model.pipeline.unload_lora_weights()
    return model


def adapts_text_encoders(lora: str) -> bool:
    """Whether a LoRA changes more than the UNet or transformer; of a hub id it is assumed. Raises: ModelNotUsable."""
    folder = Path(lora)
    if not folder.is_dir():
        return True
    try:
        for path in folder.glob("*.safetensors"):
            with cast("Any", safe_open(path, "pt")) as weights:
                names: list[str] = weights.keys()
            if any(name.startswith(("text_encoder", "lora_te")) for name in names):
                return True
    except (OSError, SafetensorError) as error:
        raise ModelNotUsable(f"the LoRA in {lora} cannot be read: {error}.") from error
    return False
