"""A UNet of SDXL's form that trains in milliseconds, as the trainer sees it."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from popalign_core.alignment.denoiser import NoiseSchedule


def tiny_unet(pooled: int = 4) -> UNet2DConditionModel:
    """SDXL's form with two narrow levels: 60 thousand parameters. pooled: numbers of a pooled embedding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=(1, 2),
            cross_attention_dim=6,
            use_linear_projection=True,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=pooled + 6 * 2,
        )


class UNetDenoiser(nn.Module):
    """A diffusers UNet in the form that training expects."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet
        self.schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50))

    def forward(self, noisy: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, pooled: Tensor) -> Tensor:
        conditions = {"text_embeds": pooled, "time_ids": torch.tensor([4.0, 4, 0, 0, 4, 4]).expand(len(noisy), -1)}
        return self.unet(noisy, timesteps, prompt_embeddings, added_cond_kwargs=conditions, return_dict=False)[0]
