"""How a model is moved. Parts of `popalign_core.config`."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from popalign_core.stage_config import Share, StageConfig


class AlignmentConfig(StageConfig):
    """How the model is moved, in rounds that each end with a measurement on validation prompts."""

    objective: Annotated[
        Literal["popalign", "popalign_exact", "dpo", "sft", "reward"],
        Field(title="Objective", description="reward: a policy gradient on images that training draws itself."),
    ] = "popalign"
    rounds: Annotated[PositiveInt, Field(title="Rounds")] = 3
    redraw: Annotated[
        bool,
        Field(title="Redraw", description="Each round from the current model's own images; off: one long training."),
    ] = True
    steps: Annotated[PositiveInt, Field(title="Steps a round")] = 25
    pairs_per_step: Annotated[PositiveInt, Field(title="Pairs a step")] = 32
    learning_rate: Annotated[float, Field(title="Learning rate", gt=0)] = 4e-5
    learning_rate_schedule: Annotated[
        Literal["constant", "cosine"], Field(title="Schedule", description="Cosine: to 0 within every training.")
    ] = "constant"
    warmup_steps: Annotated[
        int,
        Field(title="Warm-up", ge=0, description="Steps of a training in which the learning rate rises to its own."),
    ] = 0
    round_decay: Annotated[
        float, Field(title="Decay", gt=0, le=1, description="Learning rate of a round by that of the one before.")
    ] = 1.0
    beta: Annotated[
        float, Field(title="Beta", gt=0, description="On mean squared error a latent element; logged in natural units.")
    ] = 500.0
    anchor_weight: Annotated[float, Field(title="Anchor", ge=0, description="Weight of the winners' own error.")] = (
        100.0
    )
    preserve_weight: Annotated[
        float, Field(title="Preserve", ge=0, description="Weight of staying where the caption names the groups.")
    ] = 0.0
    first_timestep: Annotated[
        int, Field(title="First timestep", ge=0, description="Less noise than this is not trained on; 0 = all.")
    ] = 0
    timestep_sampling: Annotated[
        Literal["stratified", "uniform"],
        Field(title="Timesteps", description="One in each of as many equal parts as pairs in a step, or independent."),
    ] = "stratified"
    caption_dropout: Annotated[
        Share, Field(title="Dropout", description="Share of pairs trained under the empty caption.")
    ] = 0.1
    caption_mixing: Annotated[
        float,
        Field(title="Mixing", ge=0, le=1, description="Each caption is moved up to this share of the way to another."),
    ] = 0.0
    trainable: Annotated[
        Literal["all", "conditioning"],
        Field(title="Trainable part", description="All of the UNet or transformer, or only where the caption enters."),
    ] = "all"
    lora_rank: Annotated[int, Field(title="LoRA rank", ge=0, description="0 = full fine-tuning.")] = 0
    winner_preserving: Annotated[
        bool, Field(title="Winner-preserving", description="Hold back pushes from a loser that would harm its winner.")
    ] = False
    ema_decay: Annotated[
        float | None,
        Field(title="Average", ge=0, lt=1, description="Keep a moving average of the weights with this decay."),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Field(title="Gradient checkpointing", description="Computes activations twice instead of keeping them.")
    ] = False
    micro_batch: Annotated[
        int,
        Field(
            title="Micro-batch",
            ge=0,
            description="Pairs in a pass (reward: images, or steps of them); the gradient is that of the whole step. "
            "0 = all of a process's at once.",
        ),
    ] = 0
    mixed_precision: Annotated[
        bool,
        Field(title="Mixed precision", description="Passes in bfloat16; trained weights and optimizer in float32."),
    ] = False
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit"],
        Field(title="Optimizer", description="8 bit: moments in a quarter of the memory; needs the extra eight-bit."),
    ] = "adamw"
    weight_decay: Annotated[
        float, Field(title="Weight decay", ge=0, description="Of the optimizer, times the learning rate, a step.")
    ] = 0.01
    max_gradient_norm: Annotated[
        float | None,
        Field(title="Largest gradient", gt=0, description="Longer ones are cut to this norm; none = never."),
    ] = 1.0
    compiled: Annotated[
        bool,
        Field(title="Compiled", description="Repeated blocks through torch.compile; minutes at first. Not sharded."),
    ] = False
    sharded: Annotated[
        bool,
        Field(
            title="Sharded",
            description="Full fine-tuning in several processes: each keeps a part of weights, gradients and moments.",
        ),
    ] = False
    spike_limit: Annotated[
        float | None,
        Field(title="Spike", gt=0, description="Stop at a loss this many robust deviations above the last 50."),
    ] = None
    max_quality_drop: Annotated[
        float | None,
        Field(
            title="Most quality lost",
            ge=0,
            le=1,
            description="Share of the CLIP score on validation prompts that a model may lose and be kept; none = any.",
        ),
    ] = None
    seeds: Annotated[
        PositiveInt,
        Field(title="Training seeds", description="The kept round again with other seeds, all measured held out."),
    ] = 1
    checkpoint_steps: Annotated[
        PositiveInt, Field(title="Steps to a checkpoint", description="What a crash in the middle of a round can cost.")
    ] = 50

    @model_validator(mode="after")
    def _what_is_sharded(self) -> "AlignmentConfig":
        if not self.sharded:
            return self
        if self.lora_rank:
            raise ValueError("sharded is for full fine-tuning, lora_rank = 0: an adapter is small as it is")
        if self.optimizer == "adamw_8bit":
            raise ValueError("sharded needs the optimizer adamw: the blocks of adamw_8bit are not those of the parts")
        if self.objective == "reward":
            raise ValueError("sharded needs several processes, and the objective reward trains in one")
        return self

    @model_validator(mode="after")
    def _what_is_compiled(self) -> "AlignmentConfig":
        if self.compiled and self.objective == "reward":
            raise ValueError("compiled needs passes of one size, and those of the objective reward differ each time")
        if self.compiled and self.sharded:
            raise ValueError("compiled and sharded were never tried together on a GPU: turn one of them off")
        return self


class RewardConfig(StageConfig):
    """What the objective `reward` draws and trains on; its chain has the sampler's steps and guidance."""

    group_size: Annotated[
        int, Field(title="Group", ge=2, description="Images of a prompt that are drawn and judged together.")
    ] = 12
    groups: Annotated[PositiveInt, Field(title="Groups a step", description="Prompts that are drawn for a step.")] = 6
    trained_steps: Annotated[
        PositiveInt, Field(title="Trained steps", description="Denoising steps of an image that are differentiated.")
    ] = 3
    kl_weight: Annotated[
        float, Field(title="KL", ge=0, description="Weight of the divergence from the reference in a denoising step.")
    ] = 0.0
