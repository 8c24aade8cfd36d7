"""What all tests share: levels by folder, no network, no user's settings, and a count per level at the end."""

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = ("core", "storing", "tasks", "flows", "golden", "faults", "browser", "gpu", "benchmarks")
MARKED_LEVELS = {"browser": "browser", "gpu": "gpu", "benchmarks": "benchmark"}
WHOLE_TREE = "the tree"
COLLECTED = pytest.StashKey[Counter[str]]()
SELECTED = pytest.StashKey[Counter[str]]()

# Read once, when torch, Prefect and the model libraries are imported, and inherited by the processes that tests start.
PREFECT_HOME = tempfile.TemporaryDirectory(prefix="popalign-tests-")
os.environ["PREFECT_HOME"] = PREFECT_HOME.name
os.environ.pop("PREFECT_API_URL", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")


def find_chromium() -> str | None:
    """The browser to test with: Debian's or Google's, or the one that POPALIGN_CHROMIUM names."""
    names = (os.environ.get("POPALIGN_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files anew, to be reviewed as a diff"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COLLECTED] = Counter()
    config.stash[SELECTED] = Counter()


def pytest_unconfigure() -> None:
    PREFECT_HOME.cleanup()


def level_of(item: pytest.Item) -> str:
    """The folder below tests/ that a test lies in."""
    parts = item.path.relative_to(ROOT / "tests").parts
    return parts[0] if len(parts) > 1 else WHOLE_TREE


# First, so that `-m` sees the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chromium = find_chromium()
    config.stash[COLLECTED].update(level_of(item) for item in items)
    for item in items:
        level = level_of(item)
        if level in MARKED_LEVELS:
            item.add_marker(MARKED_LEVELS[level])
        if chromium is None and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason="no Chromium: apt-get install chromium, or set POPALIGN_CHROMIUM"))


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[SELECTED].update(level_of(item) for item in session.items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    collected, selected = config.stash[COLLECTED], config.stash[SELECTED]
    terminalreporter.section("tests per level")
    for level in dict.fromkeys((*LEVELS, WHOLE_TREE, *sorted(collected))):
        terminalreporter.line(f"{level:<12}{collected[level]:>5} collected{selected[level]:>5} selected")


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Paths of all files in the index, relative to the root; those deleted in the working tree are left out."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def levels() -> tuple[str, ...]:
    """Names of the folders that tests may lie in."""
    return LEVELS


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """For tests with the mark `browser`, which are skipped where there is none."""
    found = find_chromium()
    assert found is not None, "mark this test with pytest.mark.browser"
    return found


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written anew instead of compared."""
    return bool(request.config.getoption("--update-golden"))
