"""Which pieces of a run's work are left: all of them before it starts, else those that are not committed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from popalign_core.config import RunConfig
from popalign_core.workload import KEPT, ImageSet, Training, Workload, shard_sizes
from storage.artifacts import ArtifactRef, committed_keys, is_committed
from storage.layout import Workspace
from storage.retention import check_complete
from storage.tables import read_artifact, read_rows
from tasks.rates import Record, counterfactuals_drawn


@dataclass(frozen=True)
class LeftSet:
    """What is left of a set of images. drawn, classified: images of each shard. most: images, if all are drawn.

    seconded: images of each shard that the builder has to classify beside the judge.
    """

    wanted: ImageSet
    drawn: tuple[int, ...]
    classified: tuple[int, ...]
    most: int
    seconded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Left:
    """measured: whether the comparison and the decision are left. notes: sentences for who reads the plan."""

    expansion: bool
    sets: tuple[LeftSet, ...]
    trainings: tuple[Training, ...]
    measured: bool
    notes: tuple[str, ...] = ()


def whole_run(work: Workload, records: Sequence[Record], config: RunConfig) -> Left:
    """All of it. Counterfactuals as many as an earlier run over the same prompts drew, else the most there can be."""
    counts, source = counterfactuals_drawn(records, config)
    sets = [_left_set(wanted, _expected(wanted, counts), config, lambda _: False) for wanted in work.image_sets]
    notes = [f"Counterfactuals: as many as run {source} drew."] if source else []
    return Left(True, tuple(sets), work.trainings, True, tuple(notes))


def left_of_run(mine: Record, work: Workload, records: Sequence[Record], config: RunConfig) -> Left:
    """What a run that was started has left. Raises: RemovedArtifact if it cannot go on."""
    place, run_id = mine.place, mine.run_id
    check_complete(place, run_id)
    if committed_keys(place, run_id, "decisions"):
        return Left(False, (), (), False, (f"Run {run_id} has its decision: nothing is left.",))
    kept = [row["model_id"] for row in read_rows(place, run_id, "validations", equal={"selected": True})]
    counts, _ = counterfactuals_drawn(records, config)
    planned = {ref.key: ref for ref in committed_keys(place, run_id, "counterfactuals")}
    committed = {
        (ref.table, ref.key) for table in ("samples", "attributes") for ref in committed_keys(place, run_id, table)
    }

    def left_of(wanted: ImageSet) -> LeftSet:
        named = replace(wanted, model_id=_known(wanted.model_id, kept))
        ref = planned.get(f"round-{_round(wanted)}") if wanted.at_most else None
        if ref is not None:
            named = replace(named, images=len(read_artifact(ref, "counterfactuals")), at_most=False)
        return _left_set(named, _expected(named, counts), config, lambda piece: piece in committed)

    # Once validation has chosen, no round follows, however many were asked for.
    sets = [left_of(wanted) for wanted in work.image_sets if wanted.role == "judge" or not kept]
    wanted = [training for training in work.trainings if not kept or training.model_id.startswith(KEPT)]
    named = [replace(training, model_id=_known(training.model_id, kept)) for training in wanted]
    trainings = _trainings_left(place, run_id, named)
    total = sum(len(shard_sizes(wanted.images, config.sampling.shard_size)) for wanted in work.image_sets)
    done = sum(table == "samples" for table, _ in committed)
    notes = (f"Run {run_id} goes on: {done} of at most {total} shards of images are committed and not counted.",)
    return Left(not committed_keys(place, run_id, "prompts"), tuple(sets), trainings, True, notes)


def _known(model_id: str, kept: Sequence[str]) -> str:
    """The name of the kept model, or of one trained again with another seed, once validation has chosen."""
    return model_id.replace(KEPT, kept[0], 1) if kept else model_id


def _trainings_left(place: Workspace, run_id: str, trainings: Sequence[Training]) -> tuple[Training, ...]:
    refs = {training: ArtifactRef(str(place.root), run_id, "models", training.model_id) for training in trainings}
    return tuple(training for training, ref in refs.items() if not is_committed(ref))


def _expected(wanted: ImageSet, counts: dict[int, int]) -> int:
    """Of counterfactuals what an earlier run drew in that round; its last one for rounds that it did not have."""
    if not wanted.at_most or not counts:
        return wanted.images
    return min(wanted.images, counts.get(_round(wanted), counts[max(counts)]))


def _round(wanted: ImageSet) -> int:
    return int(wanted.purpose.rpartition("-")[2])


def _left_set(wanted: ImageSet, images: int, config: RunConfig, is_done: Callable[[tuple[str, str]], bool]) -> LeftSet:
    shards = shard_sizes(images, config.sampling.shard_size)
    keys = [f"{wanted.model_id}.{wanted.purpose}.{number:05d}" for number in range(len(shards))]
    drawn = [size for size, key in zip(shards, keys, strict=True) if not is_done(("samples", key))]

    def unlabelled(role: str) -> tuple[int, ...]:
        return tuple(
            size for size, key in zip(shards, keys, strict=True) if not is_done(("attributes", f"{key}.{role}"))
        )

    seconded = unlabelled("builder") if wanted.seconded else ()
    return LeftSet(wanted, tuple(drawn), unlabelled(wanted.role), sum(drawn) + wanted.images - images, seconded)
