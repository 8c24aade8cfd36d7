"""Pages on which people answer questions about images: one HTML file, one small script, and no request."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from popalign_core.errors import InvalidInput
from popalign_core.raters.answers import ALIAS_PATTERN, FORMAT, VERSION, PageKind

MOST_PAGE_BYTES = 60_000_000


@dataclass(frozen=True)
class Choice:
    """An answer to choose. key: on the keyboard. whole: it holds for all questions about the item."""

    value: str
    label: str
    key: str
    whole: bool = False


@dataclass(frozen=True)
class Ask:
    """A question about an item. choices: empty where one of two options is chosen."""

    id: str
    text: str
    hint: str
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Shown:
    """An option: an opaque id and the ids of its images."""

    id: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """One screen. options: two that are compared, or one. block: asked together, in any order; `last`: at the end."""

    id: str
    caption: str
    options: tuple[Shown, ...]
    asks: tuple[Ask, ...]
    block: str = ""
    last: bool = False


@dataclass(frozen=True)
class RatingPage:
    """All that a page holds. images: image id -> WebP bytes; nothing else tells what they are of."""

    kind: PageKind
    id: str
    title: str
    introduction: Sequence[str]
    items: Sequence[Item]
    images: Mapping[str, bytes]

    @property
    def contents(self) -> dict[str, object]:
        """What is asked of what, items in an order that says nothing."""
        items = [asdict(item) for item in sorted(self.items, key=lambda item: item.id)]
        return {"format": FORMAT, "version": VERSION, "kind": self.kind, "id": self.id, "items": items}

    @property
    def digest(self) -> str:
        """SHA-256 over the contents. Images enter by their ids, so that another encoder makes no other page of them."""
        return hashlib.sha256(json.dumps(self.contents, sort_keys=True).encode()).hexdigest()

    @property
    def questions(self) -> int:
        """Answers that a rater gives."""
        return sum(len(item.asks) for item in self.items)


def render_rating_page(page: RatingPage) -> str:
    """The whole page as HTML text. Raises: InvalidInput if it would be too large to open on a phone."""
    uris = {
        name: "data:image/webp;base64," + base64.b64encode(page.images[name]).decode("ascii")
        for name in sorted(page.images)
    }
    payload = json.dumps({**page.contents, "digest": page.digest, "images": uris}, ensure_ascii=False)
    if len(payload) > MOST_PAGE_BYTES:
        raise InvalidInput(
            f"the page would hold {len(payload) / 1e6:.0f} MB (limit {MOST_PAGE_BYTES / 1e6:.0f}): choose fewer "
            "prompts or images, or a smaller --image-size."
        )
    script = files("popalign_core.reporting").joinpath("templates/rating.js").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("rating.html.j2")
        .render(
            page=page,
            alias_pattern=ALIAS_PATTERN,
            minutes=max(1, round(page.questions * _SECONDS_EACH[page.kind] / 60)),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
            # In a script element only "<" can end the data.
            payload=Markup(payload.replace("<", "\\u003c")),
        )
    )


_SECONDS_EACH = {"study": 8, "audit": 4}


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("popalign_core.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
