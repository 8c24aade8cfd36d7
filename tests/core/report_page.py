"""Reads a report back: which elements, numbers and words it holds, section by section."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Cell:
    text: str = ""
    values: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Section:
    """rows: the cells of every table row, <th> and <td> alike. text: everything a reader sees."""

    text: str = ""
    rows: list[list[Cell]] = field(default_factory=list)


class Page(HTMLParser):
    """sections: by id. elements: (tag, attributes) of all. values: (exact, as shown) of every number."""

    def __init__(self, html: str):
        super().__init__()
        self.sections: dict[str, Section] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.values: list[tuple[float, str]] = []
        self.text = ""
        self._open: list[str] = []
        self._section = Section()
        self._cells: list[Cell] = []
        self._value: float | None = None
        self.feed(html)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = self.sections.setdefault(attributes["id"] or "", Section())
        elif tag == "tr":
            self._section.rows.append([])
        elif tag in ("td", "th"):
            self._cells.append(Cell())
            self._section.rows[-1].append(self._cells[-1])
        elif tag == "data":
            self._value = float(attributes["value"] or "")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            self._cells.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] in ("style", "title"):
            return
        self.text += data
        self._section.text += data
        if self._cells:
            self._cells[-1].text += data
        if self._value is not None:
            self.values.append((self._value, data))
            if self._cells:
                self._cells[-1].values.append((self._value, data))
            self._value = None

    def attribute(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.elements if name in attributes]

    def tags(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in names]
