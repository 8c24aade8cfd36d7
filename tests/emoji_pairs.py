"""Two pairs of noise for the emoji model to train on."""

import torch

from popalign_core.alignment.cache import AlignmentData
from popalign_core.models.sdxl import SdxlModel


def emoji_pairs(model: SdxlModel) -> AlignmentData:
    return AlignmentData(
        latent_means=torch.randn((4, 8, 16, 16), generator=torch.Generator().manual_seed(0)),
        winner=torch.arange(2),
        loser=torch.arange(2, 4),
        caption=torch.zeros(2, dtype=torch.int64),
        weight=torch.ones(2),
        population=torch.zeros(2, dtype=torch.int64),
        **model.encode_captions(["a photo of a judge"]),
    )
