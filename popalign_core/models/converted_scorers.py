"""Published scorers that are pickles, rewritten once as folders of safetensors that can be loaded safely."""

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import open_clip
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from popalign_core.errors import InvalidInput, UnknownName

# What HPS v2.1 was fine-tuned from, and what the aesthetic predictor was trained on.
HPS_ARCHITECTURE = "ViT-H-14"
AESTHETICS_BACKBONE = "ViT-L-14-quickgelu@openai"


def convert_scorer(kind: str, published: Path, folder: Path, base: str = "") -> None:
    """Writes a folder that `quality.scorers` takes as kind=folder.

    published: `HPS_v2.1_compressed.pt`, `sac+logos+ava1-l14-linearMSE.pth`, or
    `pt_inception-2015-12-05-6726825d.pth`; read without running what a pickle may hold. base: architecture of the
    preference score, or backbone of the aesthetic score, where it is another one than the published.
    Raises: UnknownName, InvalidInput.
    """
    if kind not in _CONVERSIONS:
        raise UnknownName(kind="scorer to convert", got=kind, known=list(_CONVERSIONS))
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInput(f"{folder} is not empty: name a new folder.")
    weights, settings = _CONVERSIONS[kind](_state(published), base)
    name, config_name = ("open_clip_model", "open_clip_config") if kind == "hps" else ("model", "config")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, folder / f"{name}.safetensors")
    (folder / f"{config_name}.json").write_text(json.dumps(settings, indent=1) + "\n")


def _state(path: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, UnpicklingError, RuntimeError, EOFError) as error:
        raise InvalidInput(f"{path} cannot be read as a file of weights alone: {error}") from error
    if isinstance(found, dict):
        named = cast("dict[str, Any]", found)
        state = named.get("state_dict", named)
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return dict(state)
    raise InvalidInput(f"{path} holds no mapping from names to tensors.")


def _preference(state: dict[str, Tensor], base: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    architecture = base or HPS_ARCHITECTURE
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise InvalidInput(f"open_clip knows no architecture {architecture!r}.")
    return state, {"model_cfg": config, "preprocess_cfg": {}}


def _aesthetic(state: dict[str, Tensor], base: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    if not any(name.startswith("layers.") for name in state):
        raise InvalidInput(f"no layers.<n> among {', '.join(list(state)[:4])}: not the aesthetic predictor's weights.")
    return state, {"backbone": base or AESTHETICS_BACKBONE}


def _inception(state: dict[str, Tensor], base: str) -> tuple[dict[str, Tensor], dict[str, object]]:  # noqa: ARG001
    if "Conv2d_1a_3x3.conv.weight" not in state:
        raise InvalidInput(f"no Conv2d_1a_3x3 among {', '.join(list(state)[:4])}: not the weights of FID's network.")
    return state, {"network": "inception-v3-compat"}


_Conversion = Callable[[dict[str, Tensor], str], tuple[dict[str, Tensor], dict[str, object]]]
_CONVERSIONS: dict[str, _Conversion] = {"hps": _preference, "aesthetics": _aesthetic, "inception": _inception}
