"""Networks of transformers, from a folder or the hub, in safetensors and ready to be asked."""

from pathlib import Path
from typing import Any

import torch

from popalign_core.errors import ModelNotUsable
from popalign_core.models.checkpoints import check_weights, is_path


def check_network(source: str, setting: str) -> None:
    """A local folder holds safetensors; a hub id passes. setting: where the source stands. Raises: ModelNotUsable."""
    if Path(source).is_dir():
        check_weights(Path(source))
    elif is_path(source):
        raise ModelNotUsable(f"there is no folder {source} ({setting}). A hub id is owner/name.")


def load_network(kind: Any, source: str, device: torch.device, what: str) -> Any:
    """A network in float32, frozen, on the device. kind: a model class or an Auto class. what: in the error's words.

    Weights that are not in the files, or do not fit, are an error: the library would draw them at random.
    Raises: ModelNotUsable.
    """
    check_network(source, what)
    try:
        network, report = kind.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelNotUsable(f"{source!r} could not be loaded as {what}: {error}") from error
    # A count of training steps changes nothing here, and older files lack it.
    missing = [name for name in map(str, report["missing_keys"]) if not name.endswith("num_batches_tracked")]
    if wrong := sorted([*missing, *map(str, report["mismatched_keys"])]):
        raise ModelNotUsable(
            f"{source!r} is not the weights of {what}: {len(wrong)} are missing or misfit, {wrong[0]}."
        )
    return network.to(device).eval().requires_grad_(False)


def load_processor(kind: Any, source: str, what: str, **settings: Any) -> Any:
    """What turns pictures or texts into a network's inputs. Raises: ModelNotUsable."""
    try:
        return kind.from_pretrained(source, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise ModelNotUsable(f"{source!r} has no usable processor of {what}: {error}") from error
