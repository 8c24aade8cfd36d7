"""Trains the emoji model's denoiser together with its text encoders and writes the SDXL pipeline (builder only)."""

import copy
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from popalign_core.models.emoji.autoencoder import LATENT_CHANNELS
from popalign_core.models.emoji.captions import CaptionedDraws, draw_training_batch
from popalign_core.models.emoji.text import CONTEXT_TOKENS, new_text_encoders, write_tokenizer

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR = 5.0  # Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
logger = logging.getLogger(__name__)


def new_denoiser() -> UNet2DConditionModel:
    """An untrained SDXL UNet of the emoji model's shape: 16 x 16 x 8 latents, three levels."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(3, 3, 6),
        cross_attention_dim=64 + 128,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )


def new_schedule() -> DDIMScheduler:
    """SDXL's noise schedule, sampled from the last step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


class Generator(nn.Module):
    """The trained parts: denoiser and both text encoders."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = new_denoiser().to(memory_format=torch.channels_last)  # a quarter less time a step on a CPU
        self.text_encoder: CLIPTextModel
        self.text_encoder_2: CLIPTextModelWithProjection
        self.text_encoder, self.text_encoder_2 = new_text_encoders(tokenizer)

    def forward(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, empty: Tensor) -> Tensor:
        """Predicted noise. empty: (n,) bool, captions replaced by SDXL's all-zero unconditional embedding."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        keep = (~empty).float()[:, None]
        context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * keep[:, :, None]
        conditions = {
            "text_embeds": second.text_embeds * keep,
            "time_ids": torch.tensor(TIME_IDS).expand(len(tokens), -1),
        }
        return self.unet(noisy, timesteps, context, added_cond_kwargs=conditions, return_dict=False)[0]


@dataclass(frozen=True)
class Training:
    """How long and how fast: seconds of wall time, samples a step, peak learning rate."""

    seconds: float
    batch: int = 64
    peak_lr: float = 1e-3
    ema_decay: float = 0.998
    checkpoint_seconds: float = 180.0


def _learning_rate(step: int, done: float, peak: float) -> float:
    """Warm-up over 100 steps, constant to 60% of the time, then linear to 0."""
    return peak * min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.4 + 1e-3)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    moments = [vae.encode(part).latent_dist for part in torch.split(pixels, 128)]
    return torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])


def train_generator(
    pixels: Tensor,
    vae: AutoencoderKL,
    *,
    training: Training,
    seed: int,
    folder: Path,
    start_from: Path | None = None,
) -> StableDiffusionXLPipeline:
    """Fits denoiser and text encoders for a given time on skewed draws; saves the averaged weights as it goes.

    pixels: float (n, 3, 64, 64) in [-1, 1], in the order of `render_emoji`. start_from: a pipeline folder of an earlier
    training to go on from, with a fresh optimizer.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = write_tokenizer(folder / "tokenizer")
    model = Generator(tokenizer)
    if start_from is not None:
        load_generator(model, tokenizer, start_from)
    average = copy.deepcopy(model).requires_grad_(False)
    model.unet.compile()  # a seventh less time a step on a CPU, after a minute of compiling
    latents = _encode(vae, pixels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.peak_lr, weight_decay=1e-2, fused=True)
    start, saved, step, smooth = time.monotonic(), 0.0, 0, 1.0
    while (elapsed := time.monotonic() - start) < training.seconds:
        optimizer.param_groups[0]["lr"] = _learning_rate(step, elapsed / training.seconds, training.peak_lr)
        loss = _batch_loss(model, tokenizer, latents, draw_training_batch(training.batch, rng))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        _update_average(average, model, min(training.ema_decay, (step + 1) / (step + 10)))
        smooth += 0.02 * (loss.item() - smooth)
        if elapsed - saved > training.checkpoint_seconds:
            saved = elapsed
            save_generator(average, vae, tokenizer, folder)
            logger.info("generator %.0f s, step %d, loss %.4f", elapsed, step, smooth)
    logger.info("generator done: %.0f s, step %d, loss %.4f", elapsed, step, smooth)
    return save_generator(average, vae, tokenizer, folder)


def _batch_loss(
    model: Generator, tokenizer: CLIPTokenizer, latents: tuple[Tensor, Tensor], draws: CaptionedDraws
) -> Tensor:
    """Mean squared error of the predicted noise, weighted by Min-SNR. latents: means and deviations, (n, 8, 16, 16)."""
    alphas = new_schedule().alphas_cumprod
    tokens = tokenizer(
        draws.captions, padding="max_length", max_length=CONTEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    mean, std = (values[draws.pictures] for values in latents)
    clean = mean + std * torch.randn_like(mean)
    noise = torch.randn_like(clean)
    timesteps = torch.randint(0, len(alphas), (len(clean),))
    alpha = alphas[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    empty = torch.rand(len(clean)) < EMPTY_CAPTION_SHARE
    error = (model(noisy, timesteps, tokens, empty) - noise).square().mean(dim=(1, 2, 3))
    snr = alphas[timesteps] / (1 - alphas[timesteps])
    return (snr.clamp(max=MIN_SNR) / snr * error).mean()


def load_generator(model: Generator, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Puts the weights of a pipeline folder into the model.

    A word that is no token of the folder's vocabulary begins as the mean of its pieces there.
    """
    model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / "unet").float().state_dict())
    earlier = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    known, vocabulary = earlier.get_vocab(), tokenizer.get_vocab()
    pieces = {
        place: [known[token]] if token in known else earlier.convert_tokens_to_ids(earlier.tokenize(token[:-4]))
        for token, place in vocabulary.items()
        if token in known or token.endswith("</w>")
    }
    for name in ("text_encoder", "text_encoder_2"):
        part = getattr(model, name)
        trained = cast(CLIPTextModel, type(part).from_pretrained(folder / name).float())
        before = cast(nn.Embedding, trained.get_input_embeddings()).weight.detach()
        words = cast(nn.Embedding, part.get_input_embeddings()).weight.detach()
        for place, rows in pieces.items():
            words[place] = before[rows].mean(dim=0)
        trained.set_input_embeddings(nn.Embedding.from_pretrained(words))
        part.load_state_dict(trained.state_dict())


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def save_generator(
    model: Generator, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path
) -> StableDiffusionXLPipeline:
    """Writes the complete SDXL pipeline folder in fp16 safetensors. Returns: the pipeline, in fp16."""
    half = copy.deepcopy(model).half()
    pipeline = StableDiffusionXLPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=half.text_encoder,
        text_encoder_2=half.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=half.unet,
        scheduler=new_schedule(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return pipeline
