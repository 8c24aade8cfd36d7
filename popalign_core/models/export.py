"""Weights for others: what a trained model has to be handed over as, so that plain diffusers opens it."""

import shutil
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError, safe_open

from popalign_core.errors import ModelNotUsable
from popalign_core.models.lora import FILE_NAME
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl

Form = Literal["lora", "unet", "pipeline"]


def export_form(source: ModelSource) -> Form:
    """An adapter on a plain pipeline is handed over alone, everything else as a whole UNet.

    Only where the base model's LoRA also changes the text encoders, it takes the whole pipeline.
    """
    if source.fused_lora is not None and adapts_text_encoders(source.fused_lora):
        return "pipeline"
    return "lora" if source.lora is not None and source.unet is None and source.fused_lora is None else "unet"


def export_weights(source: ModelSource, folder: Path) -> Form:
    """Writes a trained model into an existing folder: a LoRA file, `unet/`, or a pipeline, all in safetensors.

    Raises: ModelNotUsable.
    """
    form = export_form(source)
    if form == "lora":
        shutil.copyfile(Path(str(source.lora)) / FILE_NAME, folder / FILE_NAME)
    elif form == "pipeline":
        _merged(source).pipeline.save_pretrained(folder, safe_serialization=True)
    elif source.lora is None:
        shutil.copytree(str(source.unet), folder / "unet")
    else:
        save_merged_unet(source, folder)
    return form


def save_merged_unet(source: ModelSource, folder: Path) -> None:
    """Writes `unet/` with the adapter in its weights, which then loads as any other. Raises: ModelNotUsable."""
    _merged(source).pipeline.unet.save_pretrained(folder / "unet", safe_serialization=True)


def _merged(source: ModelSource) -> SdxlModel:
    # In float32: in fewer bits the sum would lose most of what an adapter adds.
    model = load_sdxl(source, device="cpu", dtype="float32")
    if source.lora is not None:
        model.pipeline.fuse_lora(components=["unet"])
        model.pipeline.unload_lora_weights()
    return model


def adapts_text_encoders(lora: str) -> bool:
    """Whether a LoRA changes more than the UNet; of a hub id it is assumed. Raises: ModelNotUsable."""
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
