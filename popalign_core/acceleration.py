"""Switches that make sampling faster and keep what is drawn, up to rounding. What changes it has no place here."""

from dataclasses import dataclass
from typing import Literal

CompileMode = Literal["none", "regional", "full"]
Layout = Literal["auto", "on", "off"]
VaeDtype = Literal["model", "float32", "bfloat16"]


@dataclass(frozen=True)
class Acceleration:
    """All of these are part of the sampler's fingerprint.

    skip_empty_attention: no cross-attention where the prompt's embedding is all zeros: its output is known.
    channels_last: memory layout of UNet and VAE; auto = on a GPU, as CPUs were measured slower with it.
    compile: none; each transformer block; or the whole UNet. fused_projections: query, key and value in one product.
    cuda_graphs: the UNet's kernels started at once. vae_dtype: model = as the UNet, or float32 where the VAE overflows
    in float16. vae_batch: latents decoded at once, 0 = the whole batch.
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


DEFAULT = Acceleration()
