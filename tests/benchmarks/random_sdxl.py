"""SDXL with random weights in the folder format of a real one: as fast as with real ones, and the pictures are none."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from popalign_core.models.architecture import SDXL
from popalign_core.models.checkpoints import resolve_source

TOKENS = 77
FIRST = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SECOND = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_UNET = {
    "block_out_channels": [32, 64, 128],
    "attention_head_dim": [1, 1, 2],
    "transformer_layers_per_block": [1, 1, 1],
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 256 + 32,
    "sample_size": 16,
}
TINY_VAE = {"block_out_channels": [32, 32, 32, 32], "sample_size": 128}


def write_random_sdxl(folder: Path, *, tiny: bool, device: torch.device) -> Path:
    """Writes an SDXL pipeline in bfloat16, 7 GB; tiny: the same layers, few and narrow. Tokenizers are the emoji's."""
    known: dict[str, Any] = json.loads(SDXL.read_text())
    small = StableDiffusionXLPipeline.from_pretrained(resolve_source("emoji"), use_safetensors=True)
    tokenizers = [small.tokenizer, small.tokenizer_2]
    for tokenizer in tokenizers:
        tokenizer.model_max_length = TOKENS
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            pipeline = StableDiffusionXLPipeline(
                vae=AutoencoderKL.from_config(known["vae"] | (TINY_VAE if tiny else {})),
                unet=UNet2DConditionModel.from_config(known["unet"] | (TINY_UNET if tiny else {})),
                text_encoder=CLIPTextModel(_text(tokenizers[0], TINY_TEXT if tiny else FIRST)),
                text_encoder_2=CLIPTextModelWithProjection(_text(tokenizers[1], TINY_TEXT if tiny else SECOND)),
                tokenizer=tokenizers[0],
                tokenizer_2=tokenizers[1],
                scheduler=small.scheduler,
                add_watermarker=False,
            )
    finally:
        torch.set_default_dtype(before)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _text(tokenizer: Any, sizes: dict[str, int]) -> CLIPTextConfig:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(
        vocab_size=49408,
        max_position_embeddings=TOKENS,
        projection_dim=sizes["hidden_size"],
        pad_token_id=tokenizer.pad_token_id,
        **special,
        **sizes,
    )
