"""Contact sheets as the page shows them: a strip of images for every prompt, before and after side by side."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from popalign_core.reporting.contact_sheet import sheet_rows
from popalign_core.reporting.formatting import axis_label, plain_words
from popalign_core.reporting.report_data import ContactSheet, Row

# Base64 makes four characters of three bytes: with this the page stays under 5 MB.
MOST_IMAGE_BYTES = 3_300_000


@dataclass(frozen=True)
class Picture:
    """A picture's place in its strip, in percent of the strip's width, and what is perceived in it."""

    number: int
    left: str
    width: str
    perceived: str


@dataclass(frozen=True)
class Strip:
    """One prompt's images as data URIs, None where a model has not been sampled."""

    label: str
    before: str | None
    after: str | None
    before_pictures: Sequence[Picture] = ()
    after_pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class StripSheet:
    """left_out: prompts that are not shown, to keep the page small."""

    title: str
    strips: Sequence[Strip]
    left_out: int

    @property
    def perceived(self) -> bool:
        """Whether something is said of single pictures."""
        return any(strip.before_pictures or strip.after_pictures for strip in self.strips)


def strip_sheets(sheets: Sequence[ContactSheet], most_bytes: int = MOST_IMAGE_BYTES) -> list[StripSheet]:
    """Cut the sheets into strips, up to so many bytes of images in all.

    Raises: InvalidInput if a sheet cannot be read or has not a row for every label.
    """
    found: list[StripSheet] = []
    left = most_bytes
    for sheet in sheets:
        strips: list[Strip] = []
        full = False
        sides = zip(_cut(sheet, sheet.before), _cut(sheet, sheet.after), strict=True)
        for place, (label, (before, after)) in enumerate(zip(sheet.row_labels, sides, strict=True)):
            size = len(before or b"") + len(after or b"")
            full = full or size > left
            if not full:
                left -= size
                pictures = (
                    () if image is None else _pictures(said, place)
                    for image, said in ((before, sheet.before_perceived), (after, sheet.after_perceived))
                )
                strips.append(Strip(label, _data_uri(before), _data_uri(after), *pictures))
        found.append(StripSheet(sheet.title, strips, len(sheet.row_labels) - len(strips)))
    return found


def perceived_text(rows: Sequence[Row], said_by: str = "judge") -> str:
    """What a classifier says of one picture: "woman, medium (judge)", "unknown: no person (judge)".

    rows: of `attributes`, one an axis. A guess of low confidence is not named: it is counted as unknown everywhere.
    """
    ordered = sorted(rows, key=lambda row: str(row["axis"]))
    statuses = {str(row["status"]) for row in ordered}
    if not ordered:
        return f"not labelled ({said_by})"
    if len(statuses) == 1 and "ok" not in statuses:
        return f"unknown: {_status_words(statuses.pop())} ({said_by})"
    return ", ".join(_outcome(row) for row in ordered) + f" ({said_by})"


def _outcome(row: Row) -> str:
    if row["status"] == "ok":
        return str(row["label"])
    axis = axis_label(str(row["axis"])).removeprefix("Perceived ")
    return f"{axis} unknown: {_status_words(str(row['status']))}"


def _status_words(status: str) -> str:
    return "several people" if status == "several" else plain_words(status).lower()


def _pictures(perceived: Sequence[Sequence[str]], place: int) -> list[Picture]:
    # As in the sheet, shorter rows are filled up with empty cells: the longest row says how wide a cell is.
    columns = max((len(row) for row in perceived), default=0)
    row = perceived[place] if place < len(perceived) else ()
    return [
        Picture(column + 1, f"{100 * column / columns:.3f}%", f"{100 / columns:.3f}%", text)
        for column, text in enumerate(row)
        if text
    ]


def _cut(sheet: ContactSheet, image: bytes | None) -> Sequence[bytes | None]:
    rows = len(sheet.row_labels)
    return list(repeat(None, rows)) if image is None else sheet_rows(image, rows)


def _data_uri(image: bytes | None) -> str | None:
    return None if image is None else "data:image/webp;base64," + base64.b64encode(image).decode("ascii")
