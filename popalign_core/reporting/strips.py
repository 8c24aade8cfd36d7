"""Contact sheets as the page shows them: a strip of images for every prompt, before and after side by side."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from popalign_core.reporting.contact_sheet import sheet_rows
from popalign_core.reporting.report_data import ContactSheet

# Base64 makes four characters of three bytes: with this the page stays under 5 MB.
MOST_IMAGE_BYTES = 3_300_000


@dataclass(frozen=True)
class Strip:
    """One prompt's images as data URIs, None where a model has not been sampled."""

    label: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class StripSheet:
    """left_out: prompts that are not shown, to keep the page small."""

    title: str
    strips: Sequence[Strip]
    left_out: int


def strip_sheets(sheets: Sequence[ContactSheet], most_bytes: int = MOST_IMAGE_BYTES) -> list[StripSheet]:
    """Cut the sheets into strips, up to so many bytes of images in all.

    Raises: InvalidInput if a sheet cannot be read or has not a row for every label.
    """
    found: list[StripSheet] = []
    left = most_bytes
    for sheet in sheets:
        strips: list[Strip] = []
        full = False
        for label, before, after in zip(
            sheet.row_labels, _cut(sheet, sheet.before), _cut(sheet, sheet.after), strict=False
        ):
            size = len(before or b"") + len(after or b"")
            full = full or size > left
            if not full:
                left -= size
                strips.append(Strip(label, _data_uri(before), _data_uri(after)))
        found.append(StripSheet(sheet.title, strips, len(sheet.row_labels) - len(strips)))
    return found


def _cut(sheet: ContactSheet, image: bytes | None) -> Sequence[bytes | None]:
    rows = len(sheet.row_labels)
    return list(repeat(None, rows)) if image is None else sheet_rows(image, rows)


def _data_uri(image: bytes | None) -> str | None:
    return None if image is None else "data:image/webp;base64," + base64.b64encode(image).decode("ascii")
