"""Which architectures can be sampled, trained and handed over, and what tells them apart; nothing is loaded here."""

from dataclasses import dataclass
from typing import Any, Literal

from popalign_core.errors import ModelNotUsable, UnknownName

DenoiserPart = Literal["unet", "transformer"]
# A latent has this many channels in the config of an AutoencoderKL that does not say.
_LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Family:
    """One class of pipelines of diffusers.

    title: as people say. pipeline: its class, as `model_index.json` names it. denoiser: the part that is trained.
    network: the class of that. text_encoders, tokenizers: parts in the order of the pipeline. optional: of these, the
    ones that may be absent (null in `model_index.json`). schedulers: the samplers that fit. noise: the class of its own
    scheduler where only one is right, else empty. conditioning: pieces of the names of the parameters through which the
    caption enters. tokens: the most that its pipeline makes of a caption. tag: what model hubs call it.
    """

    title: str
    pipeline: str
    denoiser: DenoiserPart
    network: str
    text_encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    schedulers: tuple[str, ...]
    conditioning: tuple[str, ...]
    tokens: int
    tag: str
    optional: frozenset[str] = frozenset()
    noise: str = ""

    @property
    def weighted(self) -> tuple[str, ...]:
        """The parts that hold weights."""
        return (self.denoiser, "vae", *self.text_encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders of its pipelines."""
        return (*self.weighted, *self.tokenizers, "scheduler")

    def check_scheduler(self, name: str) -> None:
        """Raises: UnknownName where a sampler does not fit, with those that do."""
        if name not in self.schedulers:
            raise UnknownName(kind=f"sampling.scheduler for {self.title}", got=name, known=self.schedulers)


_CLIP_TOKENS = 77
_DIFFUSION = ("ddim", "euler", "dpm++", "lcm")
SDXL = Family(
    title="SDXL",
    pipeline="StableDiffusionXLPipeline",
    denoiser="unet",
    network="UNet2DConditionModel",
    text_encoders=("text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    schedulers=_DIFFUSION,
    conditioning=(".attn2.", ".add_embedding."),
    tokens=_CLIP_TOKENS,
    tag="stable-diffusion-xl",
)
STABLE_DIFFUSION = Family(
    title="Stable Diffusion 1 and 2",
    pipeline="StableDiffusionPipeline",
    denoiser="unet",
    network="UNet2DConditionModel",
    text_encoders=("text_encoder",),
    tokenizers=("tokenizer",),
    schedulers=_DIFFUSION,
    conditioning=(".attn2.",),
    tokens=_CLIP_TOKENS,
    tag="stable-diffusion",
)
STABLE_DIFFUSION_3 = Family(
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    denoiser="transformer",
    network="SD3Transformer2DModel",
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    # The T5 encoder is larger than the rest together; the pipeline puts zeros in its place where it is left out.
    optional=frozenset({"text_encoder_3", "tokenizer_3"}),
    schedulers=("flow-euler",),
    noise="FlowMatchEulerDiscreteScheduler",
    # The text's side of joint attention. Its attn2, where there is one, is self-attention of the image.
    conditioning=(
        ".context_embedder.",
        ".text_embedder.",
        ".add_q_proj.",
        ".add_k_proj.",
        ".add_v_proj.",
        ".to_add_out.",
    ),
    # T5's come after CLIP's, zeros where there is no T5.
    tokens=_CLIP_TOKENS + 256,
    tag="stable-diffusion-3",
)
FAMILIES = {family.pipeline: family for family in (SDXL, STABLE_DIFFUSION, STABLE_DIFFUSION_3)}


def family_named(pipeline: object, source: object) -> Family:
    """The family of a class of pipelines. source: what has that class. Raises: ModelNotUsable, with those there are."""
    if pipeline not in FAMILIES:
        raise ModelNotUsable(f"{source} is a {pipeline}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[str(pipeline)]


def size_step(family: Family, denoiser: dict[str, Any], vae: dict[str, Any]) -> int:
    """What a side in pixels must be divisible by. denoiser, vae: their configs."""
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    if family.denoiser == "transformer":
        return pixels_per_latent * int(denoiser["patch_size"])
    return pixels_per_latent * 2 ** (len(denoiser["block_out_channels"]) - 1)


def largest_side(denoiser: dict[str, Any], vae: dict[str, Any]) -> int | None:
    """Pixels a side that a transformer has positions for; None where there is no limit."""
    positions = denoiser.get("pos_embed_max_size")
    if positions is None:
        return None
    return int(positions) * int(denoiser["patch_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def check_networks(family: Family, denoiser: dict[str, Any], vae: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Refuses what has the right parts and another meaning: other conditions, input or prediction. All are configs.

    Raises: ModelNotUsable.
    """
    conditions = "text_time" if family is SDXL else None
    if denoiser.get("addition_embed_type") != conditions:
        raise ModelNotUsable(
            f"its UNet has the addition_embed_type {denoiser.get('addition_embed_type')!r}; a UNet of {family.title} "
            f"has {conditions!r} there: what it is conditioned on beside the caption."
        )
    channels = vae.get("latent_channels", _LATENT_CHANNELS)
    if denoiser.get("in_channels", channels) != channels:
        raise ModelNotUsable(
            f"its {family.denoiser} takes {denoiser['in_channels']} channels and its VAE makes {channels}: it is made "
            "for inpainting or editing, and only text to image is supported."
        )
    check_prediction(family, scheduler)


def check_prediction(family: Family, scheduler: dict[str, Any]) -> None:
    """Refuses a scheduler whose noise or prediction the loss is not derived for. Raises: ModelNotUsable."""
    kind = scheduler.get("_class_name", family.noise)
    if family.noise and kind != family.noise:
        raise ModelNotUsable(f"its scheduler is {kind}; {family.title} is trained by flow matching: {family.noise}.")
    prediction = scheduler.get("prediction_type", "epsilon")
    if not family.noise and prediction not in ("epsilon", "v_prediction"):
        raise ModelNotUsable(
            f"its scheduler has prediction_type {prediction!r}; the losses are derived for epsilon and v_prediction."
        )
    if scheduler.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise ModelNotUsable(
            "its schedule ends without any signal (rescale_betas_zero_snr), where noise cannot be predicted: "
            "prediction_type must be v_prediction."
        )
