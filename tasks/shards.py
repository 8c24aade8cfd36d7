"""Which pieces of work are left, and who does them: any number of processes may go through the same list."""

from collections.abc import Iterator, Sequence

from popalign_core.config import RunConfig
from storage.artifacts import ArtifactRef, is_committed
from storage.locks import claimed
from tasks.classification import attributes_of
from tasks.run import reference
from tasks.sampling import plan_shards
from tasks.training_order import trained_model


def claim_each(refs: Sequence[ArtifactRef]) -> Iterator[ArtifactRef]:
    """Gives what is neither committed nor being made elsewhere, and claims it until the caller asks for the next.

    Goes through the list again as long as there was something to do: a process that had claimed a piece may have died.
    """
    waiting, given = list(refs), -1
    done: set[ArtifactRef] = set()
    while len(done) > given:
        given = len(done)
        for ref in waiting:
            with claimed(ref) as mine:
                if mine:
                    done.add(ref)
                    yield ref
        waiting = [ref for ref in waiting if ref not in done and not is_committed(ref)]


def missing_samples(workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str) -> list[ArtifactRef]:
    """Shards of images that are not committed yet."""
    shards = plan_shards(workspace, run_id, config, model_id, purpose)
    return [shard for shard in shards if not is_committed(shard)]


def missing_attributes(
    workspace: str, run_id: str, config: RunConfig, model_id: str, purpose: str, role: str
) -> list[ArtifactRef]:
    """Attributes by that classifier that are not committed yet, of all shards of images."""
    shards = plan_shards(workspace, run_id, config, model_id, purpose)
    return [ref for shard in shards if not is_committed(ref := attributes_of(shard, role))]


def missing_models(workspace: str, run_id: str, round_index: int, seed_index: int = 0) -> list[ArtifactRef]:
    """The model of a round, where it is not committed yet."""
    ref = reference(workspace, run_id, "models", trained_model(round_index, seed_index))
    return [] if is_committed(ref) else [ref]


def missing_decisions(workspace: str, run_id: str, model_id: str) -> list[ArtifactRef]:
    """The decision about a model, where it is not committed yet."""
    ref = reference(workspace, run_id, "decisions", model_id)
    return [] if is_committed(ref) else [ref]
