"""What a classifier sees in latents, decoded as the sampler decodes them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from popalign_core.attributes import Axis
from popalign_core.classification import AttributeClassifier, Status, attribute
from popalign_core.models.latent_scaling import unscaled
from popalign_core.models.sdxl import SdxlModel


def latent_shape(model: SdxlModel, image_size: int = 0) -> tuple[int, int, int]:
    """Of an image's latents, (c, h, w). image_size: pixels a side, 0 = the model's own."""
    side = (image_size or model.native_size) // model.pixels_per_latent
    return int(model.pipeline.unet.config.in_channels), side, side


def decode_latents(model: SdxlModel, latents: Tensor, at_once: int = 0) -> np.ndarray:
    """Images, uint8 (n, h, w, 3), of latents (n, c, h, w) scaled as the UNet has them. at_once: 0 = all."""
    parts: tuple[Tensor, ...] = torch.split(latents, at_once or len(latents))
    return np.concatenate([_decoded(model, part) for part in parts])


@torch.no_grad()
def _decoded(model: SdxlModel, latents: Tensor) -> np.ndarray:
    vae = model.pipeline.vae
    pixels = vae.decode(unscaled(latents, vae.config).to(vae.device, vae.dtype), return_dict=False)[0]
    images: np.ndarray = model.pipeline.image_processor.postprocess(pixels.float(), output_type="np")
    return np.round(images * 255).astype(np.uint8)


def latent_labeller(
    model: SdxlModel, classifier: AttributeClassifier, axes: Sequence[Axis], min_confidence: float, at_once: int = 0
) -> Callable[[Tensor], list[tuple[str | None, ...]]]:
    """A function from latents to the perceived group of each image on every axis, None where it is unknown.

    at_once: images that are decoded at once, 0 = all.
    """

    def label(latents: Tensor) -> list[tuple[str | None, ...]]:
        outcomes = classifier.probabilities(decode_latents(model, latents, at_once), axes)
        found = [attribute(outcome, min_confidence=min_confidence) for outcome in outcomes]
        columns = [[one.label if one.status == Status.OK else None for one in column] for column in found]
        return list(zip(*columns, strict=True))

    return label
