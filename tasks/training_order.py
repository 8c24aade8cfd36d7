"""What a round is trained from: all that its processes are told, and that they agree on it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from popalign_core.alignment.processes import Processes
from popalign_core.config import RunConfig, parse_config
from popalign_core.errors import InvalidInput, LostProcess
from storage.artifacts import ArtifactRef
from storage.layout import Workspace

WHOLE_TRAINING = "alignment"


def trained_model(round_index: int, seed_index: int = 0) -> str:
    """The id of a round's model."""
    return f"round-{round_index}" + (f"-seed-{seed_index}" if seed_index else "")


@dataclass(frozen=True)
class RoundOrder:
    """A round to be trained from the parent model on committed preferences.

    seed_index: 0 for the run's own training; any other is the same training with another seed.
    """

    preferences: ArtifactRef
    config: RunConfig
    parent_id: str
    round_index: int
    seed_index: int = 0

    @property
    def ref(self) -> ArtifactRef:
        """Of the round's model."""
        place = self.preferences
        return ArtifactRef(place.workspace, place.run_id, "models", trained_model(self.round_index, self.seed_index))

    @property
    def checkpoints(self) -> tuple[Workspace, str, str]:
        """Where they lie, as `storage.checkpoints` wants it. Without `redraw` all rounds are one training."""
        name = self.ref.key if self.config.alignment.redraw or self.seed_index else WHOLE_TRAINING
        return Workspace(Path(self.ref.workspace)), self.ref.run_id, name

    def to_json(self) -> str:
        """For `from_json`."""
        values: dict[str, object] = {"parent_id": self.parent_id, "round_index": self.round_index}
        values |= {"seed_index": self.seed_index}
        return json.dumps(
            {"preferences": asdict(self.preferences), "config": self.config.model_dump(mode="json"), **values}
        )

    @classmethod
    def from_json(cls, text: str) -> "RoundOrder":
        """The same order again."""
        values = json.loads(text)
        preferences = ArtifactRef(**values["preferences"])
        return cls(
            preferences,
            parse_config(values["config"]),
            values["parent_id"],
            values["round_index"],
            values["seed_index"],
        )


def require_same_start(processes: Processes, order: RoundOrder, step: int) -> None:
    """Checks that all processes set out from one place; waits for all. step: finished steps of the checkpoint.

    Raises: InvalidInput where hosts were told different things; LostProcess where they see different disks.
    """
    told = f"{order.config.model_dump_json()} {order.parent_id} {order.round_index} {order.seed_index}"
    answers = [text.split() for text in processes.gather_texts(f"{hashlib.sha256(told.encode()).hexdigest()} {step}")]
    if len({digest for digest, _ in answers}) > 1:
        raise InvalidInput("the hosts of this training have different configurations: make the same call on each.")
    steps = sorted({found for _, found in answers})
    if len(steps) > 1:
        raise LostProcess(f"the processes found checkpoints of steps {', '.join(steps)}: all need one workspace.")
