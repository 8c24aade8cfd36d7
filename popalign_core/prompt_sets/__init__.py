"""Built-in lists of subjects, and lists from text files: one subject a line, `#` begins a comment.

A set is a folder with a file a split. How each set was divided stands at the head of its files.
"""

import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.subjects import SPLITS, Split, Subject

SUITES = {
    "emoji-occupations": "occupations",
    "emoji-activities": "activities",
    "sdxl-occupations": "occupations",
    "descriptors": "descriptors",
    "couples": "couples",
}
# A "#" inside a word is not a comment: "C# developer".
_COMMENT = re.compile(r"(?:^|\s)#.*")


class PromptFileNotUsable(InvalidInput):
    """A prompt file is missing, empty or no text."""


def builtin(name: str) -> list[Subject]:
    """All splits of a built-in set, those for training first. Raises: UnknownName."""
    if name not in SUITES:
        raise UnknownName(kind="prompt set", got=name, known=list(SUITES))
    folder = resources.files(__package__ or __name__) / name
    return [
        Subject(text, SUITES[name], split)
        for split in SPLITS
        for text in _lines((folder / f"{split}.txt").read_text(encoding="utf-8"))
    ]


def load_prompt_file(path: Path | str, suite: str, split: Split) -> list[Subject]:
    """The subjects of a text file. Raises: PromptFileNotUsable."""
    try:
        # Also takes the mark that some editors put at the start of a file.
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise PromptFileNotUsable(f"the prompt file {str(path)!r} cannot be read: {reason}.") from error
    except UnicodeDecodeError as error:
        raise PromptFileNotUsable(f"the prompt file {str(path)!r} is no UTF-8 text.") from error
    if not (lines := _lines(content)):
        raise PromptFileNotUsable(f"the prompt file {str(path)!r} has no subject: write one a line.")
    return [Subject(text, suite, split) for text in lines]


def load_subjects(entries: Sequence[str], max_subjects: int = 0) -> list[Subject]:
    """The subjects of several sets, files and single entries, in their order.

    entries: each the name of a built-in set, "split=path" of a text file (its stem becomes the suite), or
    "split:subject" for one subject (suite "listed"). max_subjects: only the first so many of each split; 0 = all.
    Raises: UnknownName, PromptFileNotUsable.
    """
    subjects = [subject for entry in entries for subject in _of_entry(entry)]
    taken: Counter[str] = Counter()
    kept: list[Subject] = []
    for subject in subjects:
        taken[subject.split] += 1
        if not max_subjects or taken[subject.split] <= max_subjects:
            kept.append(subject)
    return kept


def _of_entry(entry: str) -> list[Subject]:
    match = re.fullmatch(r"\s*(\w+)\s*([=:])\s*(.*)", entry)
    if match is None:
        return builtin(entry.strip())
    name, sign, value = match.groups()
    if name not in SPLITS:
        raise UnknownName(kind="split", got=name, known=list(SPLITS))
    return [Subject(value, "listed", name)] if sign == ":" else load_prompt_file(value, Path(value).stem, name)


def _lines(content: str) -> list[str]:
    lines = [_COMMENT.sub("", line).strip() for line in content.splitlines()]
    return [line for line in lines if line]
