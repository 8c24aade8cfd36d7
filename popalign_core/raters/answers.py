"""The file that a rating page gives: read, checked, and refused where it is damaged, foreign or changed by hand."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from popalign_core.errors import InvalidInput

FORMAT, VERSION = "popalign-answers", 1
MOST_BYTES = 20_000_000
ALIAS_PATTERN = r"[A-Za-z0-9][A-Za-z0-9 ._\-]{0,39}"
PageKind = Literal["study", "audit"]


class UnusableAnswers(InvalidInput):
    """A file of answers is damaged, of another page, or does not fit it; nothing of it was stored."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Strict):
    """One answer. item, ask: what was shown and asked. left: the option shown first, empty where there is one alone.

    milliseconds: on the screen until it was given, all visits together.
    """

    item: str
    ask: str
    choice: str
    left: str
    milliseconds: Annotated[int, Field(ge=0, le=10**9)]


class AnswerFile(_Strict):
    """All answers of one rater to one page. digest: of the page. complete: whether everything was answered."""

    format: Literal["popalign-answers"]
    version: Literal[1]
    kind: PageKind
    id: str
    digest: str
    alias: Annotated[str, Field(pattern=f"^{ALIAS_PATTERN}$")]
    complete: bool
    answers: Annotated[list[Answer], Field(min_length=1)]
    checksum: str


def checksum(file: AnswerFile) -> str:
    """FNV-1a, 64 bits, over one line a field and answer, as the page computes it.

    It finds damage and changes by hand; whoever reads the page's script can compute it as well.
    """
    head = [file.kind, file.id, file.digest, file.alias, str(file.complete).lower()]
    lines = [f"{a.item} {a.ask} {a.choice} {a.left} {a.milliseconds}" for a in file.answers]
    value = 0xCBF29CE484222325
    for byte in "\n".join(head + lines).encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return f"{value:016x}"


def read_answers(path: Path) -> AnswerFile:
    """A file as a page gave it. Raises: UnusableAnswers."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UnusableAnswers(f"{path} has {path.stat().st_size:,} bytes: no page gives so large a file.")
        file = AnswerFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UnusableAnswers(f"{path} cannot be read ({error.strerror}).") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise UnusableAnswers(
            f"{path} is not a file of answers: {where}: {fault['msg']}. Expected the JSON file that the page gives at "
            "its end, unchanged."
        ) from error
    except ValueError as error:
        raise UnusableAnswers(
            f"{path} is not JSON ({error}). Expected the file that the page gives at its end, unchanged."
        ) from error
    if checksum(file) != file.checksum:
        raise UnusableAnswers(
            f"{path} was changed after the page wrote it: its checksum is not that of its answers. Ask {file.alias!r} "
            "to save it again."
        )
    return file


def require_page(file: AnswerFile, kind: PageKind, page_id: str, digest: str, source: Path) -> None:
    """Raises: UnusableAnswers unless the answers were given on this page."""
    if file.kind != kind:
        raise UnusableAnswers(f"{source} answers an {file.kind}, not a {kind}: use `popalign {file.kind} ingest`.")
    if (file.id, file.digest) != (page_id, digest):
        raise UnusableAnswers(
            f"{source} answers another page: {file.id} {file.digest[:12]}, and this workspace's is {page_id} "
            f"{digest[:12]}. Choose the workspace that the page was made in."
        )


def require_answered(file: AnswerFile, expected: set[tuple[str, str]], allow_incomplete: bool, source: Path) -> None:
    """Raises: UnusableAnswers unless every (item, ask) of the page is answered, once."""
    given = [(answer.item, answer.ask) for answer in file.answers]
    if foreign := sorted(set(given) - expected):
        raise UnusableAnswers(f"{source} answers what the page never asked: {' '.join(foreign[0])}.")
    if len(given) != len(set(given)):
        raise UnusableAnswers(f"{source} answers a question twice.")
    if not allow_incomplete and len(given) < len(expected):
        raise UnusableAnswers(
            f"{source} has {len(given)} of {len(expected)} answers. Let {file.alias!r} finish the page in the same "
            "browser, or take what is there with --incomplete."
        )
