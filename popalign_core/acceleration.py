"""Switches that make sampling faster and keep what is drawn, up to rounding. What changes it has no place here."""

from dataclasses import dataclass
from typing import Literal

CompileMode = Literal["none", "regional", "full"]
Layout = Literal["auto", "on", "off"]
VaeDtype = Literal["model", "float32", "bfloat16"]
# Pixels of an image from which on a GPU decodes few at once, and how many.
LARGE_IMAGE, DECODED_LARGE = 512 * 512, 2


@dataclass(frozen=True)
class Acceleration:
    """All of these are part of the sampler's fingerprint.

    skip_empty_attention: no cross-attention where the prompt's embedding is all zeros: its output is known.
    channels_last: memory layout of UNet and VAE; auto = on a GPU, as CPUs were measured slower with it.
    compile: none; each transformer block; or the whole UNet. fused_projections: query, key and value in one product.
    cuda_graphs: the UNet's kernels started at once. vae_dtype: model = as the UNet, or float32 where the VAE overflows
    in float16. vae_batch: latents decoded at once, 0 = auto: the whole batch on a CPU and where images are small; else
    2, as a VAE takes more memory for an image than the UNet does, and one image occupies a GPU.
    """

    skip_empty_attention: bool = True
    channels_last: Layout = "auto"
    compile: CompileMode = "none"
    fused_projections: bool = False
    cuda_graphs: bool = False
    vae_dtype: VaeDtype = "model"
    vae_batch: int = 0

    def in_channels_last(self, device_type: str) -> bool:
        """Whether that layout is used on a device of this type ("cpu", "cuda")."""
        return self.channels_last == "on" or (self.channels_last == "auto" and device_type != "cpu")

    def decoded_at_once(self, batch: int, device_type: str, height: int, width: int) -> int:
        """Latents that the VAE is given at once, of a batch of images of this size in pixels."""
        few = device_type != "cpu" and height * width >= LARGE_IMAGE
        return min(batch, self.vae_batch or (DECODED_LARGE if few else batch))


DEFAULT = Acceleration()
