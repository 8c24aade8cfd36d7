"""Contact sheets: many images in one, rows = prompts, columns = samples. Labels stand beside them in the HTML."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from popalign_core.errors import InvalidInput

_GAP = 2
# Drawings stay crisp and small without loss; photos would be ten times as large, and a thumbnail is only looked at.
_LOSSLESS_UP_TO = 64


def contact_sheet(rows: Sequence[Sequence[np.ndarray | None]], cell_size: int = 96) -> bytes:
    """One WebP with a cell for every image.

    rows: images of shape (height, width, 3), uint8; None leaves a cell empty, and shorter rows are filled up with such.
    cell_size: longest side of a cell in pixels; smaller images keep their size, larger ones are made smaller.
    Raises: InvalidInput if there is no image, or one has another shape or type.
    """
    images = [image for row in rows for image in row if image is not None]
    if not images:
        raise InvalidInput("a contact sheet needs one image at least.")
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InvalidInput(f"images must be (height, width, 3) of uint8, got {image.shape} of {image.dtype}.")
    side = min(cell_size, max(max(image.shape[:2]) for image in images))
    pitch = side + _GAP
    # Gaps and empty cells are transparent, so that the page shows through in light and in dark.
    sheet = Image.new("RGBA", (pitch * max(len(row) for row in rows), pitch * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            if image is not None:
                cell = Image.fromarray(image)
                cell.thumbnail((side, side), Image.Resampling.LANCZOS)
                left, top = (side - cell.width) // 2, (side - cell.height) // 2
                sheet.paste(cell, (x * pitch + left, y * pitch + top))
    return _encoded(sheet, lossless=side <= _LOSSLESS_UP_TO)


def thumbnail(image: np.ndarray, most_pixels: int) -> bytes:
    """One image (height, width, 3), uint8, as WebP of so many pixels a side at most; it is never enlarged."""
    small = Image.fromarray(image)
    small.thumbnail((most_pixels, most_pixels), Image.Resampling.LANCZOS)
    return _encoded(small, lossless=max(small.size) <= _LOSSLESS_UP_TO)


def sheet_rows(sheet: bytes, rows: int) -> list[bytes]:
    """The rows of a sheet as WebP images of their own. Raises: InvalidInput if it has not that many equal rows."""
    try:
        image = Image.open(io.BytesIO(sheet)).convert("RGBA")
    except UnidentifiedImageError as error:
        raise InvalidInput(f"a contact sheet of {len(sheet)} bytes is not an image that can be read.") from error
    if rows < 1 or image.height % rows:
        raise InvalidInput(f"a contact sheet {image.height} pixels high has not {rows} equal rows.")
    height = image.height // rows
    strips = [image.crop((0, y * height, image.width, (y + 1) * height)) for y in range(rows)]
    return [_encoded(strip, lossless=height <= _LOSSLESS_UP_TO + _GAP) for strip in strips]


def _encoded(image: Image.Image, *, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=80, method=4)
    return buffer.getvalue()
