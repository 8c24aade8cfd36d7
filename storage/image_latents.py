"""Moments of the latents of a run's images, kept for its later rounds, training seeds, processes and resumes.

    runs/<run>/.latents/<VAE digest>/<hash of the image>.npz

Half a byte a pixel where latents have 4 channels: 512 KiB an image of 1024 pixels a side; 2 MiB with 16 channels. They
go when the run is at its end, and with checkpoints (`popalign gc`); removed at any other time they are encoded again.
"""

import shutil
from pathlib import Path

import numpy as np

from storage.array_files import read_arrays, write_arrays
from storage.disk import disk_errors
from storage.layout import Workspace, check_name

LATENTS = ".latents"
NAMES = ("mean", "deviation")
Moments = tuple[np.ndarray, ...]


def read_latents(workspace: Workspace, run_id: str, vae: str, image: str) -> Moments | None:
    """Moments of an image, (c, h, w) each, None where they are not kept.

    vae: digest of all that moves them. image: hash of its stored bytes.
    """
    return read_arrays(_path(workspace, run_id, vae, image), NAMES)


def kept_latents(workspace: Workspace, run_id: str, vae: str) -> set[str]:
    """Hashes of the images whose moments are kept; a damaged one counts as kept until it is read."""
    return {path.stem for path in _folder(workspace, run_id, vae).glob("[!.]*.npz")}


def write_latents(workspace: Workspace, run_id: str, vae: str, image: str, moments: Moments) -> None:
    """Keeps moments; two writers of one image write the same. Raises: StorageFull."""
    path = _path(workspace, run_id, vae, image)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, dict(zip(NAMES, moments, strict=True)))


def remove_latents(workspace: Workspace, run_id: str) -> None:
    """Removes all of a run: nothing of it is trained any more."""
    shutil.rmtree(workspace.run_folder(run_id) / LATENTS, ignore_errors=True)


def _folder(workspace: Workspace, run_id: str, vae: str) -> Path:
    return workspace.run_folder(run_id) / LATENTS / check_name("VAE", vae)


def _path(workspace: Workspace, run_id: str, vae: str, image: str) -> Path:
    return _folder(workspace, run_id, vae) / f"{check_name('image', image)}.npz"
