"""Rounds on the embedded model in memory, by the configuration of its preset: what objectives are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from popalign_core.alignment.adapters import Policy
from popalign_core.alignment.cache import AlignmentData
from popalign_core.alignment.chain import Conditions
from popalign_core.alignment.policy_gradient import RewardData
from popalign_core.alignment.reward import ParityTarget, RewardSettings
from popalign_core.alignment.settings import AlignmentSettings
from popalign_core.assessment.disparity import l2_discrepancy
from popalign_core.assessment.obedience import Answers, compare_obedience
from popalign_core.assessment.resampling import Comparison, Estimate
from popalign_core.assessment.uncertainty import compare
from popalign_core.attributes import AXES
from popalign_core.classification import AttributeClassifier, attribute
from popalign_core.config import RunConfig
from popalign_core.counterfactuals import pair_counterfactuals, plan_counterfactuals
from popalign_core.expansion import Prompt, prompts_of
from popalign_core.models.attribute_heads import HeadClassifier
from popalign_core.models.latent_labels import latent_labeller, latent_shape
from popalign_core.models.sdxl import ModelSource, SdxlModel, load_sdxl
from popalign_core.models.trainable import SdxlDenoiser
from popalign_core.models.zero_shot import ZeroShotClassifier
from popalign_core.overshoot import Populations, plan_past_target, plan_prompts
from popalign_core.population_counts import LabelledSample, PopulationPlan, by_prompt, group_counts
from popalign_core.populations import PopulationPair
from popalign_core.preferences import PairWeighting, Preference
from popalign_core.sampling import ImageRequest, SamplingSettings, sample_images
from popalign_core.seeds import derive_seed, sample_seed

Wanted = list[tuple[Prompt, int]]
ENCODE_BATCH = 64


@dataclass(frozen=True)
class Measured:
    """Labels by the judge. counts: by axis, (prompts, groups); unknown: by axis; answers: by axis, what was asked."""

    counts: dict[str, np.ndarray]
    unknown: dict[str, int]
    answers: dict[str, Answers]

    def against(self, before: "Measured", axis: str) -> tuple[Comparison, Comparison]:
        """Mean L2 over prompts, and obedience, before and after."""
        target = AXES[axis].uniform()
        disparity = compare(
            before.counts[axis],
            self.counts[axis],
            target,
            l2_discrepancy,
            unknown=(before.unknown[axis], self.unknown[axis]),
            rng=np.random.default_rng(0),
        )
        obeyed = compare_obedience(
            before.answers[axis], self.answers[axis], unknown_is_wrong=True, rng=np.random.default_rng(0)
        )
        return disparity, obeyed


def numbers(estimate: Estimate) -> list[float]:
    return [round(value, 4) for value in (estimate.value, estimate.low, estimate.high)]


def row_of(now: Measured, base: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for axis in now.counts:
        disparity, obeyed = now.against(base, axis)
        row[axis] = {
            "before": numbers(disparity.before),
            "after": numbers(disparity.after),
            "ratio": numbers(disparity.ratio),
            "floor": round(disparity.after.floor or 0.0, 4),
            "unknown": now.unknown[axis],
            "shares": [round(share, 3) for share in (now.counts[axis].sum(0) / now.counts[axis].sum()).tolist()],
            "obeyed_before": numbers(obeyed.before),
            "obeyed": numbers(obeyed.after),
        }
    return row


class Study:
    """One seed of a configuration. The sampler is a second model in bfloat16, which makes studies affordable.

    compiled: worth its half minute where much is sampled.
    """

    def __init__(self, config: RunConfig, seed: int, *, compiled: bool = True):
        self.config, self.seed = config, seed
        self.axes = tuple(AXES[name] for name in config.expansion.axes)
        self.prompts = prompts_of(config.expansion)
        self.sampler = load_sdxl(ModelSource(config.model), dtype="bfloat16")
        if compiled:
            self.sampler.pipeline.unet.compile()
        self.builder: AttributeClassifier = ZeroShotClassifier(config.classification.builder)
        self.judge: AttributeClassifier = HeadClassifier(config.classification.judge)
        self.first: tuple[Populations, Populations] = {}, {}
        self.drawn = 0

    def use(self, policy: Policy) -> None:
        """Sample from the policy from now on."""
        denoiser = policy.denoiser
        assert isinstance(denoiser, SdxlDenoiser)
        self.sampler.pipeline.unet.load_state_dict(denoiser.unet.state_dict())

    def neutral(self, split: str) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.split == split and prompt.kind == "neutral"]

    def draw(self, wanted: Wanted) -> np.ndarray:
        """Images, uint8 (n, h, w, 3), of (prompt, index), with the seeds of a run."""
        requests = [
            ImageRequest(f"{p.prompt_id}/{i}", p.prompt_id, p.text, i, sample_seed(self.seed, p.family_id, i))
            for p, i in wanted
        ]
        values = self.config.sampling.model_dump(exclude={"shard_size", "image_size", "approximate"}) | {
            "dtype": "bfloat16"
        }
        settings = SamplingSettings(height=0, width=0, **values)
        return np.stack([image.pixels for batch in sample_images(self.sampler, requests, settings) for image in batch])

    def label(self, images: np.ndarray, wanted: Wanted, classifier: AttributeClassifier) -> list[LabelledSample]:
        least = self.config.classification.min_confidence
        columns = [
            [found.label if found.status == "ok" else None for found in attribute(outcome, min_confidence=least)]
            for outcome in classifier.probabilities(images, self.axes)
        ]
        cells = list(zip(*columns, strict=True))
        return [
            LabelledSample(f"{p.prompt_id}/{i}", p.prompt_id, i, c) for (p, i), c in zip(wanted, cells, strict=True)
        ]

    def measure(self, split: str = "eval", images: int | None = None) -> Measured:
        """The current sampler on neutral prompts of a split, and on prompts that name the groups."""
        neutral = self.neutral(split)
        many = images or self.config.images.evaluation
        wanted = [(prompt, index) for prompt in neutral for index in range(many)]
        found = self.label(self.draw(wanted), wanted, self.judge)
        named = [(p, i) for p in self.prompts if p.split == split and p.kind == "specific" for i in range(1)]
        obeyed = self.label(self.draw(named), named, self.judge)
        counts: dict[str, np.ndarray] = {}
        unknown: dict[str, int] = {}
        answers: dict[str, Answers] = {}
        for place, axis in enumerate(self.axes):
            columns = [
                group_counts([s.cell[place] for s in found if s.prompt_id == p.prompt_id], axis) for p in neutral
            ]
            counts[axis.name] = np.stack([column for column, _ in columns])
            unknown[axis.name] = sum(count for _, count in columns)
            asked = [prompt.cell[place] for prompt, _ in named]
            seen = [sample.cell[place] for sample in obeyed]
            answers[axis.name] = Answers(asked, seen, [str(prompt.parent_id) for prompt, _ in named])
        return Measured(counts, unknown, answers)

    def pairs(self, round_index: int) -> AlignmentData:
        """Counterfactual pairs of the current sampler, as a run builds them."""
        first, many = (round_index - 1) * self.config.images.train_neutral, self.config.images.train_neutral
        neutral = self.neutral("train")
        wanted = [(prompt, index) for prompt in neutral for index in range(first, first + many)]
        images = self.draw(wanted)
        self.drawn = len(images)
        own = self.label(images, wanted, self.builder)
        by_cell = {(p.parent_id, p.cell): p for p in self.prompts if p.kind == "specific"}
        seed = derive_seed(self.seed, "counterfactuals", round_index)
        populations = by_prompt(own)
        plans = self._plans(populations, round_index)
        planned = {p: plan_counterfactuals(p, mine, plans[p], seed) for p, mine in populations.items()}
        changed = [(parent, change) for parent, changes in planned.items() for change in changes]
        again = [(by_cell[parent, change.cell], change.index) for parent, change in changed]
        redrawn = self.draw(again)
        self.drawn += len(redrawn)
        labels = self.label(redrawn, again, self.builder)
        image_of = {change.sample_id: label for (_, change), label in zip(changed, labels, strict=True)}
        preferences: list[Preference] = []
        for prompt in neutral:
            name = prompt.prompt_id
            outcome = pair_counterfactuals(prompt, populations[name], planned[name], image_of, plans[name])
            preferences += outcome.preferences if isinstance(outcome, PopulationPair) else ()
        captions = {label.sample_id: prompt.text for label, (prompt, _) in zip(labels, again, strict=True)}
        captions |= {s.sample_id: by_cell[s.prompt_id, s.cell].text for s in own if None not in s.cell}
        samples = [sample.sample_id for sample in (*own, *labels)]
        return self._data(preferences, np.concatenate([images, redrawn]), samples, captions)

    def _plans(self, own: Populations, round_index: int) -> dict[str, PopulationPlan]:
        populations = self.config.populations
        seed = derive_seed(self.seed, "populations", round_index)
        plan = PopulationPlan(self.axes, populations.size, seed, PairWeighting(populations.weighting))
        if not populations.overshoot:
            return plan_prompts(plan, own)
        wanted = [(p, index) for p in self.neutral("validation") for index in range(self.config.images.validation)]
        now = by_prompt(self.label(self.draw(wanted), wanted, self.builder))
        if round_index == 1:
            self.first = own, now
        first, before = self.first
        past = {axis.name: populations.overshoot_of(axis.name) for axis in self.axes}
        return plan_past_target(plan, own, first, (before, now), past)

    def _data(
        self, pairs: Sequence[Preference], images: np.ndarray, samples: list[str], caption_of: dict[str, str]
    ) -> AlignmentData:
        model = load_sdxl(ModelSource(self.config.model))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = [model.encode_images(part) for part in torch.split(pixels, ENCODE_BATCH)]
        sides = [(pair.winner_sample_id, pair.loser_sample_id) for pair in pairs]
        captions = sorted({p.caption for p in pairs} | {caption_of[sample] for side in sides for sample in side})
        populations = sorted({pair.population_id for pair in pairs})
        return AlignmentData(
            latent_means=torch.cat([mean for mean, _ in encoded]),
            latent_deviations=torch.cat([deviation for _, deviation in encoded]),
            winner=torch.tensor([samples.index(pair.winner_sample_id) for pair in pairs]),
            loser=torch.tensor([samples.index(pair.loser_sample_id) for pair in pairs]),
            caption=torch.tensor([captions.index(pair.caption) for pair in pairs]),
            weight=torch.tensor([pair.weight for pair in pairs], dtype=torch.float32),
            population=torch.tensor([populations.index(pair.population_id) for pair in pairs]),
            winner_caption=torch.tensor([captions.index(caption_of[winner]) for winner, _ in sides]),
            loser_caption=torch.tensor([captions.index(caption_of[loser]) for _, loser in sides]),
            **model.encode_captions(captions),
        )

    def reward_data(self, model: SdxlModel) -> RewardData:
        """The training prompts with even targets and the builder; what is drawn for them is the policy's own."""
        neutral = self.neutral("train")
        encoded = model.encode_captions([prompt.text for prompt in neutral])
        names = ("prompt_embeddings", "pooled", "empty_prompt_embedding", "empty_pooled")
        return RewardData(
            tuple(prompt.prompt_id for prompt in neutral),
            Conditions(*(encoded[name] for name in names)),
            tuple(ParityTarget(axis, axis.uniform()) for axis in self.axes),
            latent_labeller(model, self.builder, self.axes, self.config.classification.min_confidence),
            latent_shape(model),
        )

    def reward(self) -> RewardSettings:
        """As many images an update as make the steps of the preset's rounds draw what its rounds draw."""
        sampling = self.config.sampling
        return RewardSettings(chain_steps=sampling.steps, guidance_scale=sampling.guidance_scale)

    def settings(self, steps: int, round_index: int = 1, **changes: Any) -> AlignmentSettings:
        """The preset's training, for that many steps."""
        names = {"objective", "pairs_per_step", "learning_rate_schedule", "first_timestep", "beta", "anchor_weight"}
        values = self.config.alignment.model_dump(
            include=names | {"preserve_weight", "learning_rate", "caption_mixing"}
        )
        seed = derive_seed(self.seed, "alignment", round_index)
        return AlignmentSettings(
            **(values | {"steps": steps, "seed": seed, "timestep_sampling": "stratified"} | changes)
        )
