"""One image with all that is known of it."""

from dataclasses import dataclass
from typing import Any

from popalign_core.errors import InvalidInput
from storage.catalog import query, rebuild_catalog
from storage.layout import Workspace
from storage.tables import read_images, read_rows


@dataclass(frozen=True)
class Shown:
    """A sample's row, its prompt's, its attributes and neighbours. image: stored bytes, None where removed."""

    sample: dict[str, Any]
    prompt: dict[str, Any]
    attributes: list[dict[str, Any]]
    neighbours: list[dict[str, Any]]
    image: bytes | None


def shown_sample(workspace: str, sample_id: str, run_id: str = "") -> Shown:
    """Everything about an image. run_id: empty = the only run that has it. Raises: InvalidInput."""
    place = Workspace.open(workspace)
    wanted = {"sample_id": sample_id}
    runs = [run_id] if run_id else place.run_ids()
    found = [(run, rows[0]) for run in runs if (rows := read_rows(place, run, "samples", equal=wanted))]
    if not found:
        where = f"run {run_id}" if run_id else f"{len(runs)} runs"
        raise InvalidInput(
            f"no committed image {sample_id!r} in {where} of {place.root}. An id is model/prompt/index: "
            'popalign sql "SELECT sample_id FROM samples LIMIT 5".'
        )
    if len(found) > 1:
        raise InvalidInput(f"{sample_id} is in runs {', '.join(run for run, _ in found)}: name one with --run-id.")
    run, sample = found[0]
    rebuild_catalog(place)
    neighbours = query(place, f"FROM neighbours({_quoted(run)}, {_quoted(sample_id)}) WHERE NOT itself").to_pylist()
    return Shown(
        sample,
        read_rows(place, run, "prompts", equal={"prompt_id": sample["prompt_id"]})[0],
        read_rows(place, run, "attributes", equal=wanted),
        neighbours,
        read_images(place, run, [sample_id]).get(sample_id),
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
