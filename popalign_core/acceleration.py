"""Switches that make sampling faster and keep what is drawn, up to rounding. What changes it has no place here."""

from dataclasses import dataclass
from typing import Literal

CompileMode = Literal["none", "regional", "full"]
VaeDtype = Literal["model", "float32", "bfloat16"]


@dataclass(frozen=True)
class Acceleration:
    """All of these are part of the sampler's fingerprint.

    skip_empty_attention: no cross-attention where the prompt's embedding is all zeros: its output is known.
    channels_last: memory layout of UNet and VAE. compile: none; each transformer block; or the whole UNet.
    fused_projections: query, key and value in one product. cuda_graphs: the UNet's kernels started at once.
    vae_dtype: model = as the UNet, or float32 where the VAE overflows in float16. vae_batch: latents decoded at once,
    0 = the whole batch.
    """

    skip_empty_attention: bool = True
    channels_last: bool = True
    compile: CompileMode = "none"
    fused_projections: bool = False
    cuda_graphs: bool = False
    vae_dtype: VaeDtype = "model"
    vae_batch: int = 0


DEFAULT = Acceleration()
