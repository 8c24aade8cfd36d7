"""The batch that fits the memory: found once, and then what the next shard starts with."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from popalign_core.devices import device_name
from popalign_core.models.checkpoints import source_digest
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.sampling import SampledImage, SamplingSettings
from storage.batch_sizes import keep_batch_size, read_batch_size
from storage.layout import Workspace


def fitting(workspace: str, model: TextToImageModel, settings: SamplingSettings) -> SamplingSettings:
    """The settings, with the smaller batch that an earlier shard had to take."""
    found = read_batch_size(Workspace.open(workspace), _circumstances(model, settings), settings.batch_size)
    return replace(settings, batch_size=found)


def keeping_batch_size(
    workspace: str, model: TextToImageModel, settings: SamplingSettings, batches: Iterable[list[SampledImage]]
) -> Iterator[list[SampledImage]]:
    """Passes batches on; one that had to be smaller is kept for `fitting`."""
    size = settings.batch_size
    for batch in batches:
        if batch[0].batch_size < size:
            fits, size = batch[0].batch_size, batch[0].batch_size
            keep_batch_size(Workspace.open(workspace), _circumstances(model, settings), fits, 2 * fits)
        yield batch


def _circumstances(model: TextToImageModel, settings: SamplingSettings) -> dict[str, str]:
    # The pipeline's digest: a trained model of it takes as much.
    return {
        "model": source_digest(model.source.pipeline),
        "height": str(settings.height or model.native_size),
        "width": str(settings.width or model.native_size),
        "device": device_name(model.device),
        "dtype": settings.dtype,
    }
