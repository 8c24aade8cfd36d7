"""Prompts that an alignment must leave alone: people whose group is a fact, and pictures without a person."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from popalign_core.attributes import AXES
from popalign_core.errors import InvalidInput, UnknownName
from popalign_core.expansion import Kind, Prompt, prompt_id

BUILT_IN = ("people-and-things",)
CONTROLS: tuple[Kind, ...] = ("fact", "no_person")
SEPARATOR = "|"


def load_controls(entries: Sequence[str], prefix: str) -> list[Prompt]:
    """Held-out prompts of kind fact or no_person. entries: names of built-in lists, or paths of text files.

    A line is a subject, and after a bar its facts as "axis=group, axis=group"; "#" begins a comment line.
    Raises: InvalidInput, UnknownName (axis or group).
    """
    prefix = " ".join(prefix.split()) + " " if prefix.strip() else ""
    prompts = [prompt for entry in entries for prompt in _of_list(entry, prefix)]
    if twice := sorted({p.text for p in prompts if sum(other.text == p.text for other in prompts) > 1}):
        raise InvalidInput(f"the control prompt {twice[0]!r} stands there twice.")
    return prompts


def _of_list(entry: str, prefix: str) -> list[Prompt]:
    name = Path(entry).stem
    if entry in BUILT_IN:
        text = (resources.files("popalign_core") / "control_prompts" / f"{entry}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(entry).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(BUILT_IN)
            raise InvalidInput(
                f"expansion.controls: {entry!r} is no built-in list ({known}), nor a text file."
            ) from error
    lines = [line.strip() for line in text.splitlines()]
    found = [_prompt(line, name, prefix) for line in lines if line and not line.startswith("#")]
    if not found:
        raise InvalidInput(f"expansion.controls: {entry!r} has no subject: write one a line.")
    return found


def _prompt(line: str, suite: str, prefix: str) -> Prompt:
    subject, bar, facts = (part.strip() for part in line.partition(SEPARATOR))
    if not subject or (bar and not facts):
        raise InvalidInput(f"control prompt {line!r}: a subject is expected, and after a bar axis=group.")
    known = dict(_fact(fact, line) for fact in facts.split(",")) if facts else {}
    kind: Kind = "fact" if known else "no_person"
    text = prefix + subject
    return Prompt(prompt_id(text), text, "eval", suite, subject, kind, None, known, prefix)


def _fact(text: str, line: str) -> tuple[str, str]:
    axis, _, group = (part.strip() for part in text.partition("="))
    if axis not in AXES:
        raise UnknownName(kind=f"axis in control prompt {line!r}", got=axis, known=list(AXES))
    groups = [str(known) for known in AXES[axis].groups]
    if group not in groups:
        raise UnknownName(kind=f"group in control prompt {line!r}", got=group, known=groups)
    return axis, group
