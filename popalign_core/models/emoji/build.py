"""Builds the embedded emoji model from the three free emoji sets: renders, trains, writes the checkpoint folders.

    python -m popalign_core.models.emoji.build --work .emoji-build

Needs npm (fetches three packages, under 6 MB) and the development extra (resvg-py). Every part that lies finished in
the work folder is kept, so an interrupted build goes on with the next part; the generator starts from its last
checkpoint. Nothing here runs outside a build.
"""

import argparse
import logging
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from popalign_core.models.emoji.autoencoder import as_pixels, train_autoencoder
from popalign_core.models.emoji.data import EmojiSet, render_emoji, render_objects
from popalign_core.models.emoji.generator import Training, train_generator
from popalign_core.models.emoji.judges import train_clip_judge, train_residual_judge
from popalign_core.models.emoji.pictures import labelled_pictures

HERE = Path(__file__).parent
PARTS = {"generator": "pipeline", "judge-clip": "judge-clip", "judge-residual": "judge-residual"}
logger = logging.getLogger(__name__)


def build(work: Path, *, autoencoder_s: float, judge_s: float, generator_s: float) -> None:
    """Trains every part for the given seconds of wall time; skips parts that are finished in the work folder."""
    people = render_emoji(work / "npm")
    vae = _autoencoder(work / "autoencoder", people, autoencoder_s)
    if not (work / "judge-residual").is_dir():
        pictures = labelled_pictures(people, render_objects(work / "npm"), vae)
        train_clip_judge(pictures, seconds=judge_s, seed=11, folder=work / "judge-clip")
        train_residual_judge(pictures, seconds=judge_s, seed=22, folder=work / "judge-residual")
    earlier = work / "generator"
    train_generator(
        as_pixels(people.images),
        vae,
        training=Training(seconds=generator_s),
        seed=1,
        folder=earlier,
        start_from=earlier if (earlier / "model_index.json").is_file() else None,
    )


def _autoencoder(folder: Path, people: EmojiSet, seconds: float) -> AutoencoderKL:
    if not (folder / "config.json").is_file():
        train_autoencoder(as_pixels(people.images), seconds=seconds, seed=1, checkpoint=folder)
    return AutoencoderKL.from_pretrained(folder).float().eval().requires_grad_(False)


def install(work: Path) -> None:
    """Copies the finished folders into the package."""
    for part, name in PARTS.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(work / part, HERE / name)


def main() -> None:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(description="Build the embedded emoji model.")
    parser.add_argument("--work", type=Path, default=Path(".emoji-build"), help="folder for packages and checkpoints")
    parser.add_argument("--autoencoder-seconds", type=float, default=600)
    parser.add_argument("--judge-seconds", type=float, default=400)
    parser.add_argument("--generator-seconds", type=float, default=5400)
    parser.add_argument("--install", action="store_true", help="copy the result into the package")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.set_flush_denormal(True)
    build(
        arguments.work,
        autoencoder_s=arguments.autoencoder_seconds,
        judge_s=arguments.judge_seconds,
        generator_s=arguments.generator_seconds,
    )
    if arguments.install:
        install(arguments.work)


if __name__ == "__main__":
    main()
