"""Every function, class, module and setting that docs/method.md names exists: equations keep their functions."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from popalign_core.config import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
PACKAGES = ("popalign_core.alignment.", "popalign_core.assessment.", "popalign_core.", "")
DOTTED = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)`")
LINK = re.compile(r"\[`([^`]+)`\]\(([^)]+)\)")
EQUATION = re.compile(r"^ {4}.*\S {2,}\((\d+[a-z]?)\)$", re.MULTILINE)
SECTION = re.compile(r"^### .*\(`([^)]*)`\)$")


def members_of_tables() -> list[str]:
    """The names in columns that are headed "function", with the module that their section names."""
    found: list[str] = []
    module, column = "", None
    for line in DOCUMENT.splitlines():
        if match := SECTION.match(line):
            module = match[1].split("`")[0]
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) < 3:
            column = None
        elif "function" in cells:
            column = cells.index("function")
        elif column is not None:
            found += [
                name if "." in name else f"{module}.{name}" for name in re.findall(r"`([A-Za-z_.\w]+)`", cells[column])
            ]
    return found


NAMES = sorted({*DOTTED.findall(DOCUMENT), *members_of_tables()})


def exists(name: str) -> bool:
    return is_setting(name) or any(is_member(package + name) for package in PACKAGES)


def is_member(path: str) -> bool:
    """Whether the longest part that is a module has the rest as its member; fields of a dataclass count."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for member in parts[length:]:
            known = member in getattr(found, "__annotations__", {})
            if not (known or hasattr(found, member)):
                return False
            found = getattr(found, member, None)
        return True
    return False


def is_setting(name: str) -> bool:
    model: type[BaseModel] = RunConfig
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
        if position + 1 < len(parts):
            if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
                return False
            model = annotation
    return True


def test_names_are_found_at_all() -> None:
    assert len(NAMES) > 40
    assert {"objective.popalign_loss", "passes.measure_errors", "disparity.l2_discrepancy"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_document_names_exists(name: str) -> None:
    assert exists(name), f"docs/method.md names {name}, which is neither in popalign_core nor a setting"


def test_an_equation_has_a_number_of_its_own() -> None:
    numbers = EQUATION.findall(DOCUMENT)
    assert len(numbers) == len(set(numbers)), sorted(number for number in numbers if numbers.count(number) > 1)
    whole = {int(number) for number in numbers if number.isdigit()}
    assert whole == set(range(1, max(whole) + 1)), "no number is left out"
    assert {number[:-1] for number in numbers if not number.isdigit()} <= {str(number) for number in whole}


def test_a_name_that_is_none_is_noticed() -> None:
    assert not exists("objective.popalign_los")
    assert not exists("alignment.speed")


@pytest.mark.parametrize(("name", "target"), LINK.findall(DOCUMENT))
def test_links_lead_to_the_file_of_what_they_name(name: str, target: str) -> None:
    path = (ROOT / "docs" / target).resolve()
    assert path.is_file()
    module = name.split(".")[0]
    assert path.stem == module
    for member in name.split(".")[1:]:
        assert re.search(rf"(def|class) {member}\b", path.read_text(encoding="utf-8"))
