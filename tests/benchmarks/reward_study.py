"""The policy gradient in a study: resumable, since it draws for hours what others draw in minutes.

    python tests/benchmarks/reward_study.py FOLDER --seed 0 --rate 1e-3 --steps 8,30 --images 24

writes FOLDER/rows.jsonl and goes on, when called again, from FOLDER/state. Nothing is compiled: it costs as much as a
dozen updates.
"""

import argparse
import json
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment_study import Study, row_of

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.checkpoint import begin, load_state, save_state
from popalign_core.alignment.policy_gradient import train_on_reward
from popalign_core.alignment.trainer import StepRecord
from popalign_core.config import with_settings
from popalign_core.models.sdxl import ModelSource, load_sdxl
from popalign_core.models.trainable import make_policy
from popalign_core.presets import preset

Trained = Iterator[tuple[Policy, StepRecord]]


def reward_training(study: Study, steps: int, folder: Path | None = None, **changes: Any) -> Trained:
    """One training on the reward, at a constant learning rate. folder: of its state after every update, or None."""
    model = load_sdxl(ModelSource(study.config.model), dtype="float32")
    policy = make_policy(model, lora_rank=0, seed=0, trainable=study.config.alignment.trainable)
    constant = {"learning_rate_schedule": "constant", "preserve_weight": 0.0, "caption_mixing": 0.0}
    settings = study.settings(steps, objective="reward", reward=study.reward(), **(constant | changes))
    state = load_state(policy, settings, folder) if folder and folder.exists() else begin(policy, settings)
    for record in train_on_reward(policy, study.reward_data(model), settings, state=state):
        if folder is not None:
            staged = folder.with_name("staged")
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            save_state(state, staged)
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
        yield policy, record


def main() -> None:
    """One seed and learning rate, measured after every number of steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", default="8,30")
    parser.add_argument("--images", type=int, default=24)
    asked = parser.parse_args()
    folder, steps = asked.folder, sorted(int(step) for step in asked.steps.split(","))
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(with_settings(preset("emoji"), {"populations.overshoot": "0"}), asked.seed, compiled=False)
    before = folder / "base.pickle"
    if not before.exists():
        before.write_bytes(pickle.dumps(study.measure(images=asked.images)))
    base = pickle.loads(before.read_bytes())
    started, cpu = time.perf_counter(), time.process_time()
    with (folder / "rows.jsonl").open("a") as rows:

        def tell(**values: Any) -> None:
            spent = {"wall_s": round(time.perf_counter() - started), "cpu_s": round(time.process_time() - cpu)}
            rows.write(json.dumps({"seed": asked.seed, "rate": asked.rate} | values | spent) + "\n")
            rows.flush()

        for policy, record in reward_training(study, steps[-1], folder / "state", learning_rate=asked.rate):
            tell(**asdict(record))
            if record.step in steps:
                study.use(policy)
                tell(measured=record.step, **row_of(study.measure(images=asked.images), base))
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
