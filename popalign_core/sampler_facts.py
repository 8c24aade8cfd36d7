"""What can move a pixel: written down, hashed, compared, so that images drawn differently are not mixed silently."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

import torch

from popalign_core.devices import device_name

if TYPE_CHECKING:
    from popalign_core.models.text_to_image import TextToImageModel
    from popalign_core.sampling import SamplingSettings

Facts = Mapping[str, str]
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
# What differs between a model and the one it was trained from, and is what a comparison is about.
COMPARED = ("model",)
NOT_RECORDED = {"sampler": "not recorded"}


def sampler_facts(model: "TextToImageModel", settings: "SamplingSettings") -> dict[str, str]:
    """Name -> value of all that can move a pixel of an image drawn by these settings, as it is in effect.

    Raises: InvalidInput where an attention kernel was asked for that cannot be used.
    """
    from popalign_core.models.attention import used_kernel
    from popalign_core.models.denoising import skips_empty_attention

    values = asdict(settings)
    switches = cast("dict[str, object]", values.pop("acceleration"))
    height, width = settings.size(model)
    in_effect = {
        "height": height,
        "width": width,
        "attention": used_kernel(model.network, settings.attention),
        "skip_empty_attention": settings.guidance_scale > 1 and skips_empty_attention(model, settings.acceleration),
        "channels_last": settings.acceleration.in_channels_last(model.device.type),
        "vae_dtype": str(model.pipeline.vae.dtype).removeprefix("torch."),
        "vae_batch": settings.decoded_at_once(model),
    }
    facts = {**values, **switches, **in_effect, "model": model.source.digest(), **_surroundings(model.device)}
    return {name: str(value) for name, value in sorted(facts.items())}


def _surroundings(device: torch.device) -> dict[str, object]:
    libraries = {name: version(name) for name in LIBRARIES} | {"device": device_name(device)}
    precision = {"float32_products": torch.get_float32_matmul_precision()}
    if device.type != "cuda":
        return {**libraries, **precision}
    return {
        **libraries,
        **precision,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
    }


def fingerprint(facts: Facts) -> str:
    """Names facts (16 hex digits)."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:16]


def sampler_fingerprint(model: "TextToImageModel", settings: "SamplingSettings") -> str:
    """Names everything that can move a pixel: weights, settings, switches in effect, device and library versions."""
    return fingerprint(sampler_facts(model, settings))


def sampler_differences(samplers: Iterable[Facts]) -> dict[str, tuple[str, ...]]:
    """Facts in which several ways of drawing differ, apart from the model's weights: name -> values, each once."""
    known = [dict(facts) for facts in samplers]
    names = sorted({name for facts in known for name in facts} - set(COMPARED))
    found = {name: tuple(dict.fromkeys(facts.get(name, "not recorded") for facts in known)) for name in names}
    return {name: values for name, values in found.items() if len(values) > 1}


def difference_text(differences: Mapping[str, tuple[str, ...]]) -> str:
    """Differences in one line: "batch_size: 8, 4; device: ..."."""
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in differences.items())
