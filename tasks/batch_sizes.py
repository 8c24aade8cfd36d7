"""The batch that fits the memory, and how many of it are decoded at once: what the next shard begins with.

The UNet is done when the VAE begins, so that `vae_batch` does not decide which batch fits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

from popalign_core.devices import device_name
from popalign_core.models.checkpoints import source_digest
from popalign_core.models.text_to_image import TextToImageModel
from popalign_core.sampling import SampledImage, SamplingSettings
from storage.batch_sizes import keep_batch_size, read_batch_size
from storage.layout import Workspace

# What is found, and what takes no memory to speak of.
_LEFT_OUT = ("batch_size", "vae_batch", "scheduler", "steps", "guidance_scale", "distilled_lora")


def fitting(workspace: str, model: TextToImageModel, settings: SamplingSettings) -> SamplingSettings:
    """The settings, with the smaller batch, or fewer latents decoded at once, that an earlier shard had to take."""
    place = Workspace.open(workspace)
    batch = read_batch_size(place, _denoising(model, settings), settings.batch_size)
    smaller = replace(settings, batch_size=batch)
    wanted = smaller.decoded_at_once(model)
    at_once = read_batch_size(place, _decoding(model, smaller), wanted)
    return smaller if at_once == wanted else smaller.decoding(at_once)


def keeping_batch_size(
    workspace: str, model: TextToImageModel, settings: SamplingSettings, batches: Iterable[list[SampledImage]]
) -> Iterator[list[SampledImage]]:
    """Passes batches on; what had to be smaller than the settings say is kept for `fitting`."""
    place = Workspace.open(workspace)
    for batch in batches:
        size, at_once = batch[0].batch_size, batch[0].vae_batch
        if size < settings.batch_size:
            keep_batch_size(place, _denoising(model, settings), size, _too_large(settings.batch_size, size))
            settings = replace(settings, batch_size=size)
        if at_once and at_once < (wanted := settings.decoded_at_once(model)):
            keep_batch_size(place, _decoding(model, settings), at_once, _too_large(wanted, at_once))
            settings = settings.decoding(at_once)
        yield batch


def _too_large(tried: int, fits: int) -> int:
    """The least that failed on the way to what fits: the sampler halves, and rounds down."""
    while tried // 2 > fits:
        tried //= 2
    return tried


def _denoising(model: TextToImageModel, settings: SamplingSettings) -> dict[str, str]:
    """All that decides how much memory an image takes; a setting that is added is among it."""
    values = asdict(settings)
    values |= values.pop("acceleration")
    height, width = settings.size(model)
    return {name: str(value) for name, value in values.items() if name not in _LEFT_OUT} | {
        # The pipeline's digest: a trained model of it takes as much.
        "model": source_digest(model.source.pipeline),
        "height": str(height),
        "width": str(width),
        "device": device_name(model.device),
        "guided": str(settings.guidance_scale > 1),
    }


def _decoding(model: TextToImageModel, settings: SamplingSettings) -> dict[str, str]:
    # A recorded UNet keeps its activations, and those are of its batch.
    return _denoising(model, settings) | {"decoded in batches of": str(settings.batch_size)}
