"""The way in: which family a pipeline is of, and the model loaded as that."""

from pathlib import Path

from popalign_core.acceleration import VaeDtype
from popalign_core.models.checkpoints import check_pipeline_folder, resolve_source
from popalign_core.models.families import SDXL, STABLE_DIFFUSION, STABLE_DIFFUSION_3, Family, family_named
from popalign_core.models.sdxl import DtypeName, ModelSource, load_sdxl, pipeline_index
from popalign_core.models.stable_diffusion import load_stable_diffusion
from popalign_core.models.stable_diffusion_3 import load_stable_diffusion_3
from popalign_core.models.text_to_image import TextToImageModel

_LOADERS = {
    SDXL.pipeline: load_sdxl,
    STABLE_DIFFUSION.pipeline: load_stable_diffusion,
    STABLE_DIFFUSION_3.pipeline: load_stable_diffusion_3,
}


def family_of(pipeline: str) -> Family:
    """The family of a pipeline: an embedded name, a folder or a hub id. Raises: ModelNotUsable."""
    folder = Path(resolve_source(pipeline))
    if folder.exists():
        return check_pipeline_folder(folder)
    return family_named(pipeline_index(pipeline).get("_class_name"), pipeline)


def load_model(
    source: ModelSource, *, device: str = "auto", dtype: DtypeName = "float32", vae_dtype: VaeDtype = "model"
) -> TextToImageModel:
    """The model of a source, as its pipeline's class in `model_index.json` says. vae_dtype: see `load_pipeline`.

    Raises: ModelNotUsable, InvalidInput.
    """
    return _LOADERS[family_of(source.pipeline).pipeline](source, device=device, dtype=dtype, vae_dtype=vae_dtype)
