"""Rules that hold for the whole tree: what lies where, how long it may be, and what must never be committed."""

import ast
import io
import sys
import tokenize
from collections import Counter
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "popalign_core", "storage")
TOP_FOLDERS = {".ci", "docs", "tests", "typings", *PACKAGES}
TOP_FILES = {
    ".gitattributes",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "NOTICE",
    "README.md",
    "prefect.yaml",
    "pyproject.toml",
    "requirements.lock",
}
FUNCTION_CODE_LINES = 45
FILE_LINES = 300
WEIGHTS_BYTES = 40 * 1000**2
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
BLANK_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
# In two parts, so that this file does not name them itself.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry.npmjs", "org"),
        ("registry.yarnpkg", "com"),
        ("deb.debian", "org"),
        ("security.debian", "org"),
        ("archive.ubuntu", "com"),
        ("download.pytorch", "org"),
        ("conda.anaconda", "org"),
    )
]


@pytest.fixture(scope="module")
def sources(tracked_files: list[Path]) -> list[Path]:
    """Python files of the product."""
    return [path for path in tracked_files if path.suffix == ".py" and path.parts[0] in PACKAGES]


def code_lines_per_function(source: str) -> dict[str, int]:
    """Lines with code, docstrings, comments and blank lines apart; by name and line of each function."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {
        row for token in tokens if token.type not in BLANK_TOKENS for row in range(token.start[0], token.end[0] + 1)
    }
    lengths: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        rows = code.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if ast.get_docstring(node) is not None:
            rows -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        lengths[f"{node.name}:{node.lineno}"] = len(rows)
    return lengths


def test_nothing_else_lies_at_the_top(tracked_files: list[Path]):
    folders = {path.parts[0] for path in tracked_files if len(path.parts) > 1}
    files = {path.name for path in tracked_files if len(path.parts) == 1}
    assert folders - TOP_FOLDERS == set()
    assert files - TOP_FILES == set()


def test_tests_are_no_packages_and_lie_in_a_level(tracked_files: list[Path], levels: tuple[str, ...]):
    tests = [path for path in tracked_files if path.parts[0] == "tests" and path.suffix == ".py"]
    assert [str(path) for path in tests if path.name == "__init__.py"] == []
    assert {path.parts[1] for path in tests if len(path.parts) > 2} - set(levels) == set()


def test_test_files_have_unique_names(tracked_files: list[Path]):
    names = Counter(path.name for path in tracked_files if path.parts[0] == "tests" and path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


def test_nothing_installed_has_the_name_of_a_package_or_flow(sources: list[Path]):
    """Prefect puts flows/ first on the import path, where a file shadows any package of its name."""
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() not in {ROOT, ROOT / "flows"}]
    flow_files = [path.stem for path in sources if path.parent == Path("flows") and path.stem != "__init__"]
    for name in [*PACKAGES, *flow_files]:
        assert name not in sys.stdlib_module_names
        found = PathFinder.find_spec(name, elsewhere)
        # A folder without __init__.py (tests/flows, when pytest adds tests/) is a namespace and shadows nothing.
        assert found is None or found.origin is None, f"{name} is also {found.origin}"


def test_functions_and_files_are_short(sources: list[Path]):
    long_functions: list[str] = []
    long_files: list[str] = []
    for path in sources:
        text = (ROOT / path).read_text(encoding="utf-8")
        lengths = code_lines_per_function(text).items()
        long_functions += [f"{path}:{name} has {count}" for name, count in lengths if count > FUNCTION_CODE_LINES]
        if len(text.splitlines()) > FILE_LINES:
            long_files.append(f"{path} has {len(text.splitlines())}")
    assert long_functions == []
    assert long_files == []


def test_code_lines_leave_out_docstring_comments_and_blanks():
    source = (
        'def f(\n    x,\n):\n    """Doc\n\n    string."""\n    # why\n\n    y = (\n        x\n    )\n    return y\n'
    )
    assert code_lines_per_function(source) == {"f:1": 7}


def test_no_file_names_a_registry(tracked_files: list[Path]):
    texts = {path: (ROOT / path).read_bytes().lower() for path in tracked_files if path.suffix != ".safetensors"}
    assert [f"{path}: {host}" for path, text in texts.items() for host in REGISTRY_HOSTS if host.encode() in text] == []


def test_no_pickles_are_tracked(tracked_files: list[Path]):
    assert [str(path) for path in tracked_files if path.suffix.lower() in PICKLES] == []


def test_model_weights_fit(tracked_files: list[Path]):
    weights = {str(path): (ROOT / path).stat().st_size for path in tracked_files if path.suffix == ".safetensors"}
    assert sum(weights.values()) <= WEIGHTS_BYTES, weights
