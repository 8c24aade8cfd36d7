"""The tree in README.md is the tree: every tracked file once, with a comment.

The block starts with a line "```text" and the line "popalign/". Each further line is a name, indented by spaces or by
drawn branches, "#", and a comment; folders end with "/". A folder without lines below it stands for all its files:
allowed where none of them is Python (weights, golden files, pictures). Empty `__init__.py` files may be left out.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = re.compile(r"^(?P<indent>[\s│├└─]*)(?P<name>[^\s#]+)(?:\s+#\s*(?P<comment>.*))?$")


def parse_tree(block: str) -> tuple[dict[Path, str], set[Path]]:
    """Comments by path, and the folders among the paths that have no lines below them."""
    comments: dict[Path, str] = {}
    folders: list[tuple[int, Path]] = []
    childless: set[Path] = set()
    for line in block.splitlines():
        if not line.strip(" │"):
            continue
        match = LINE.match(line)
        assert match, f"not a line of the tree: {line!r}"
        indent, name = len(match["indent"]), match["name"]
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else Path()
        path = parent / name
        assert path not in comments, f"{path} stands in the tree twice"
        comments[path] = (match["comment"] or "").strip()
        childless.discard(parent)
        if name.endswith("/"):
            folders.append((indent, path))
            childless.add(path)
    return comments, childless


@pytest.fixture(scope="module")
def readme_tree() -> tuple[dict[Path, str], set[Path]]:
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing"
    block = re.search(r"^```text\npopalign/[^\n]*\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.S | re.M)
    assert block, 'README.md has no block that starts with "```text" and "popalign/"'
    return parse_tree(block[1])


def test_every_tracked_file_stands_in_the_tree(
    readme_tree: tuple[dict[Path, str], set[Path]], tracked_files: list[Path]
):
    comments, childless = readme_tree
    missing = [
        str(path)
        for path in tracked_files
        if path not in comments
        and not childless.intersection(path.parents)
        and not (path.name == "__init__.py" and not (ROOT / path).read_bytes().strip())
    ]
    assert not missing, f"tracked, but not in README's tree: {missing}"


def test_every_line_of_the_tree_is_tracked(readme_tree: tuple[dict[Path, str], set[Path]], tracked_files: list[Path]):
    comments, _ = readme_tree
    known = {*tracked_files, *(parent for path in tracked_files for parent in path.parents)}
    gone = [str(path) for path in comments if path not in known]
    assert not gone, f"in README's tree, but not tracked: {gone}"


def test_every_line_has_a_comment(readme_tree: tuple[dict[Path, str], set[Path]]):
    bare = [str(path) for path, comment in readme_tree[0].items() if not comment]
    assert not bare, f"in README's tree without a comment: {bare}"


def test_only_folders_without_source_are_one_line(
    readme_tree: tuple[dict[Path, str], set[Path]], tracked_files: list[Path]
):
    hidden = [str(p) for p in tracked_files if p.suffix == ".py" and readme_tree[1].intersection(p.parents)]
    assert not hidden, f"source that README's tree hides behind its folder: {hidden}"


def test_the_parser_reads_spaces_and_branches():
    spaced = "a/  # folder\n  b.py  # one\nc/  # closed\nd.md  # two\n"
    drawn = "├── a/        # folder\n│   └── b.py  # one\n│\n├── c/  # closed\n└── d.md      # two\n"
    expected = {Path("a"): "folder", Path("a/b.py"): "one", Path("c"): "closed", Path("d.md"): "two"}
    assert parse_tree(spaced) == parse_tree(drawn) == (expected, {Path("c")})
