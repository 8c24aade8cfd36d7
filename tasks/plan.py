"""What a run would do, counted before anything is loaded."""

from collections.abc import Callable, Sequence
from math import prod

from popalign_core.attributes import AXES
from popalign_core.config import RunConfig
from popalign_core.prompt_sets import load_subjects
from popalign_core.sample_sets import slices


def planned_work(config: RunConfig) -> list[tuple[str, str, str]]:
    """Rows of (stage, what, how many)."""
    subjects = load_subjects(config.expansion.prompts, config.expansion.max_subjects)
    cells = prod(len(AXES[name].groups) for name in config.expansion.axes)
    by_split = {split: sum(s.split == split for s in subjects) for split in ("train", "validation", "eval")}
    rows = [
        ("expansion", f"{split} prompts, neutral + specific", f"{n} + {n * cells}") for split, n in by_split.items()
    ]

    def images(purpose: str) -> int:
        parts = slices(purpose, config.images)
        return sum(by_split[p.split] * p.per_prompt * (cells if p.kind == "specific" else 1) for p in parts)

    rounds = config.alignment.rounds
    draws = rounds if config.alignment.redraw else 1
    rows += [
        ("alignment", "images of rounds" if draws > 1 else "images, drawn once", str(draws * images("round"))),
        *_counterfactual_rows(config, draws * by_split["train"]),
        ("alignment", f"validation images, {rounds + 1} models", str((rounds + 1) * images("validation"))),
        ("alignment", "steps", f"{rounds} x {config.alignment.steps}, {config.alignment.pairs_per_step} pairs each"),
        ("assessment", "images, two models", str(2 * _sum(images, ("evaluation", "trained", "obedience")))),
    ]
    return rows


def _counterfactual_rows(config: RunConfig, prompts: int) -> list[tuple[str, str, str]]:
    if config.populations.winners != "counterfactual":
        return []
    most = prompts * config.images.train_neutral
    return [("alignment", "counterfactual images, at most", str(most))]


def _sum(count: Callable[[str], int], purposes: Sequence[str]) -> int:
    return sum(count(purpose) for purpose in purposes)
