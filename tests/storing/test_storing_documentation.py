"""docs/tables.md says what the schemas say, and every number has a unit."""

from pathlib import Path

import pyarrow as pa

from storage.columns import UNITS
from storage.schemas import FOLDER, TABLES, VERSIONS, document, schema

DOCUMENT = Path(__file__).parents[2] / "docs" / "tables.md"
WRITE = "python -c 'import storage.schemas as s; print(s.document(), end=\"\")' > docs/tables.md"


def is_number(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return is_number(kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def test_the_document_is_true():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), f"write it again: {WRITE}"


def test_every_column_stands_in_the_document():
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.splitlines()[0] for section in sections] == list(TABLES)
    for section, name in zip(sections, TABLES, strict=True):
        for field in schema(name):
            mark = "?" if field.nullable else ""
            assert f"\n| {field.name}{mark} | {field.type} |" in section


def test_every_number_has_a_unit_and_every_column_a_comment():
    fields = [(name, field) for name in TABLES for field in schema(name)]
    assert [(name, f.name) for name, f in fields if is_number(f.type) and not f.metadata[b"unit"]] == []
    assert [(name, f.name) for name, f in fields if not f.metadata[b"comment"]] == []
    assert set(UNITS) - {field.name for _, field in fields} == set()


def test_every_table_has_a_version_and_a_folder():
    assert set(VERSIONS) == set(TABLES)
    assert all(version >= 1 for version in VERSIONS.values())
    assert set(FOLDER) | set(FOLDER.values()) <= set(TABLES)
    for name in TABLES:
        assert schema(name).metadata == {b"table": name.encode(), b"version": str(VERSIONS[name]).encode()}
