"""What samplers' fingerprints stand for, and where images that are compared or mixed were drawn differently."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger

from popalign_core.sampler_facts import NOT_RECORDED, difference_text, fingerprint, sampler_differences
from storage.artifacts import ArtifactRef, is_committed
from storage.commit import staged_artifact
from storage.layout import Workspace
from storage.tables import read_artifact, read_rows, write_rows
from tasks.run import reference

Facts = Mapping[str, str]


def record_sampler(workspace: str, run_id: str, facts: Facts) -> str:
    """Commits what a fingerprint stands for; the fingerprint."""
    name = fingerprint(facts)
    ref = reference(workspace, run_id, "samplers", name)
    if not is_committed(ref):
        with staged_artifact(ref) as folder:
            write_rows(folder, "samplers", [{"run_id": run_id, "sampler_fingerprint": name, "facts": facts}])
    return name


def samplers_of(shards: Iterable[ArtifactRef]) -> dict[str, Facts]:
    """By fingerprint: facts of all samplers that drew these shards; of older ones only that they are not known."""
    found: dict[str, Facts] = {}
    for shard in shards:
        names = {row["sampler_fingerprint"] for row in read_artifact(shard, "samples")} - found.keys()
        found |= recorded_samplers(Workspace.open(shard.workspace), shard.run_id, names)
    return found


def recorded_samplers(place: Workspace, run_id: str, names: Iterable[str]) -> dict[str, Facts]:
    """By fingerprint: what these stand for in a run; where that was not recorded, only that."""
    rows = {name: read_rows(place, run_id, "samplers", keys=[name]) if name else [] for name in names}
    return {name: dict(found[0]["facts"]) if found else NOT_RECORDED for name, found in rows.items()}


def report_differences(compared: str, key: str, shards: Sequence[ArtifactRef]) -> None:
    """Commits `sampler_differences` and warns where these shards, of one run, were not all drawn alike.

    compared: what is made of them, in words. key: names it.
    """
    differences = sampler_differences(samplers_of(shards).values())
    if not differences:
        return
    logger().warning("%s: images were drawn differently (%s)", compared, difference_text(differences))
    ref = reference(shards[0].workspace, shards[0].run_id, "sampler_differences", key)
    rows = [
        {"run_id": ref.run_id, "compared": compared, "fact": fact, "values": list(values)}
        for fact, values in differences.items()
    ]
    if not is_committed(ref):
        with staged_artifact(ref) as folder:
            write_rows(folder, "sampler_differences", rows)


def logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The run's logger, or Prefect's where there is no run."""
    try:
        return get_run_logger()
    except MissingContextError:
        return get_logger("popalign")
