"""Renders the three free emoji sets into labelled 64 x 64 images. Used by the builder only, never at run time."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from popalign_core.models.emoji.roles import GENDERS, OBJECTS, ROLES, TONES, VENDORS

PACKAGES = {
    "noto": ("@iconify-json/noto", "1.2.9", "-skin-tone"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "-skin-tone"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", ""),
}
SIZE_PIXELS = 64
# Mean absolute difference (0 to 255) below which two variants of a drawing count as the same picture.
SAME_PICTURE = 0.35


@dataclass(frozen=True)
class EmojiSet:
    """Images uint8 (n, 64, 64, 3) with integer labels (n,) into VENDORS, ROLES, GENDERS and TONES.

    gender_visible, tone_visible: (n,) bool, whether the drawing changes at all when the attribute does.
    """

    images: np.ndarray
    vendor: np.ndarray
    role: np.ndarray
    gender: np.ndarray
    tone: np.ndarray
    gender_visible: np.ndarray
    tone_visible: np.ndarray


def fetch_icons(vendor: str, folder: Path) -> dict[str, Any]:
    """Fetches one set's npm package (kept in the folder) and returns its icons.json."""
    package, version, _ = PACKAGES[vendor]
    archive = folder / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        if member is None:
            raise FileNotFoundError(f"{archive} holds no package/icons.json")
        return json.load(member)


def _svg(icons: dict[str, Any], key: str) -> str:
    while key not in icons["icons"]:
        key = icons["aliases"][key]["parent"]
    icon = icons["icons"][key]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def _render(svg: str) -> np.ndarray:
    import resvg_py  # a builder's dependency

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE_PIXELS, height=SIZE_PIXELS))
    with Image.open(io.BytesIO(png)) as drawing:
        rgba = drawing.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _variants(icons: dict[str, Any], suffix: str) -> Iterator[np.ndarray]:
    for role in ROLES:
        drawings = [_render(_svg(icons, f"{gender}-{role.key}-{tone}{suffix}")) for gender in GENDERS for tone in TONES]
        yield np.stack(drawings).reshape(len(GENDERS), len(TONES), SIZE_PIXELS, SIZE_PIXELS, 3)


def render_emoji(folder: Path) -> EmojiSet:
    """Renders every role, gender and tone of every vendor.

    Returns: 10 images per role and vendor, ordered by (vendor, role, gender, tone).
    """
    blocks = np.stack([np.stack(list(_variants(fetch_icons(v, folder), PACKAGES[v][2]))) for v in VENDORS])
    values = blocks.astype(np.float32)
    gender_visible = np.abs(values[:, :, 0] - values[:, :, 1]).mean(axis=(-3, -2, -1)) > SAME_PICTURE  # (v, r, tone)
    tone_steps = np.abs(np.diff(values, axis=3)).mean(axis=(-3, -2, -1)).min(axis=-1) > SAME_PICTURE  # (v, r, gender)
    grid = np.indices(blocks.shape[:4]).reshape(4, -1)
    vendor, role, gender, tone = grid
    return EmojiSet(
        images=blocks.reshape(-1, SIZE_PIXELS, SIZE_PIXELS, 3),
        vendor=vendor,
        role=role,
        gender=gender,
        tone=tone,
        gender_visible=gender_visible[vendor, role, tone],
        tone_visible=tone_steps[vendor, role, gender],
    )


def render_objects(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures without a person. Returns: uint8 (n, 64, 64, 3) and the vendor's index (n,)."""
    images: list[np.ndarray] = []
    vendors: list[int] = []
    for vendor_index, vendor in enumerate(VENDORS):
        icons = fetch_icons(vendor, folder)
        images += [_render(_svg(icons, key)) for key in OBJECTS]
        vendors += [vendor_index] * len(OBJECTS)
    return np.stack(images), np.array(vendors)
