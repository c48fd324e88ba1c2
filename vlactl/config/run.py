"""The typed configuration of a run, frozen after it is loaded.

Sections `env`, `model` and `algorithm` belong to plugins: their class comes from the plugin that
the section's `name` picks (see `vlactl.config.compose`). Everything else is here. No code changes
a config; derived numbers are computed once, in `vlactl.launch.plan`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
)

from vlactl.api.plugins import AlgorithmConfig, EnvironmentConfig, ModelConfig
from vlactl.errors import ConfigError

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


def _run_name(value: str) -> str:
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            "1 to 80 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return value


def _index_list(value: object) -> object:
    """Accept "0-3,8" beside [0, 1, 2, 3, 8]."""
    if not isinstance(value, str):
        return value
    indices: list[int] = []
    for part in filter(None, (piece.strip() for piece in value.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(f'"{part}" is neither an index nor a range like "0-3"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'range "{part}" runs backwards')
        indices.extend(range(first, last + 1))
    return indices


def _names(value: object) -> object:
    """Accept "a,b" beside ["a", "b"]."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _counts(value: object) -> object:
    """One count or several; "3,5" beside [3, 5]."""
    pieces = value.split(",") if isinstance(value, str) and "," in value else value
    counts = [pieces] if not isinstance(pieces, list | tuple) else pieces
    if value is None:
        return None
    if not counts or not all(re.fullmatch(r"[1-9]\d*", str(each).strip()) for each in counts):
        raise ValueError("wanted a number from 1, or a list of such numbers")
    return tuple(map(int, counts)) if isinstance(pieces, list | tuple) else int(str(value))


def _distinct(value: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if value is not None and (len(set(value)) != len(value) or not value):
        raise ValueError("indices must be distinct, and at least one")
    return value


Indices = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None,
    BeforeValidator(_index_list),
    AfterValidator(_distinct),
]
Beta = Annotated[FiniteFloat, Field(ge=0, lt=1)]
RunName = Annotated[str, AfterValidator(_run_name)]


def read_indices(text: str) -> tuple[int, ...]:
    """The indices that "0-3,8" names.

    Raises:
        ConfigError: the text is something else.
    """
    try:
        return _INDICES.validate_python(text) or ()
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f'"{text}" does not name indices: {reason}', hint='examples: "5", "0-3", "0-3,8"'
        ) from error


_INDICES: TypeAdapter[tuple[int, ...] | None] = TypeAdapter(Indices)


class Section(BaseModel):
    """Base of the engine's own sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RolloutConfig(Section):
    """Which episodes a training step plays, and how the policy acts in them."""

    episodes_per_step: int = Field(
        64, ge=1, description="Trajectories of a step, all ranks together."
    )
    order: Literal["ordered", "random", "informative"] = Field(
        "ordered",
        description="Walk a shuffled list of all (task, trial) pairs, or draw them at random; "
        "informative = draw tasks more often whose recent success in training lies between 0 and "
        "1, solved ones least; a fifth of the groups is spread over all tasks whatever their "
        "success.",
    )
    tasks: Indices = Field(None, description='Task indices, e.g. [0, 3] or "0-4,7"; none = all.')
    trials: Indices = Field(None, description="Initial states to train on; none = all.")
    auto_reset: bool = Field(
        False,
        description="Fill every trajectory up to the horizon with further episodes of its task, "
        "the last one cut; for algorithms that do not compare episodes.",
    )
    temperature: FiniteFloat = Field(1.0, gt=0, description="Of sampling, in rollout and update.")
    batch_size: int = Field(
        0,
        ge=0,
        description="Rows of every inference call (short batches are padded), whatever the number "
        "of ranks: it decides the last bits of logits. 0 = env.num_envs, at most 8.",
    )
    pipeline_stages: int = Field(1, ge=1, description="Parts into which a rank's slots are split.")
    max_restarts_per_step: int = Field(
        16,
        ge=0,
        description="Simulator failures of a rank, in a step (or in a round of "
        "algorithm.resample_rounds), after which an episode's group is dropped.",
    )
    min_groups: int = Field(1, ge=1, description="Complete groups below which a step fails.")


class OptimConfig(Section):
    """Optimizer and batch arithmetic of the update."""

    lr: FiniteFloat = Field(2e-5, gt=0, description="Learning rate of the policy.")
    value_lr: FiniteFloat = Field(3e-3, gt=0, description="Learning rate of the value head.")
    decay_steps: int = Field(
        0,
        ge=0,
        description="Steps of `vlactl train` within which both rates fall to a tenth, along half "
        "a cosine; 0 = they stay.",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW.")
    eps: FiniteFloat = Field(1e-8, gt=0, description="AdamW.")
    weight_decay: FiniteFloat = Field(0.01, ge=0, description="AdamW.")
    clip_grad: FiniteFloat = Field(1.0, gt=0, description="Maximum global gradient norm.")
    global_batch_size: int = Field(
        16384, ge=1, description="Samples (chunks, padding included) of one optimizer step."
    )
    micro_batch_size: int = Field(32, ge=1, description="Samples of one backward pass on a rank.")
    update_epochs: int = Field(1, ge=1, description="Passes over the step's samples.")
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit keeps the moments in 8 bits (bitsandbytes)."
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="What a NaN or infinite loss or gradient does to the run."
    )


class SupervisedConfig(Section):
    """The supervised stage, `vlactl sft`: what it learns from, and for how long."""

    data: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="Folders that `vlactl demos` has made (--data)."
    )
    demos_per_task: Annotated[int | tuple[int, ...] | None, BeforeValidator(_counts)] = Field(
        None,
        description="The first episodes of each task only: one number for all tasks, or a list "
        "with one for each, those of the first data set before those of the next; none = all.",
    )
    every: int = Field(1, ge=1, description="Learn from every so many-th frame.")
    steps: int = Field(10_000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(256, ge=1, description="Samples of a step, all ranks together.")
    lr: FiniteFloat = Field(3e-4, gt=0, description="Peak of the learning rate.")
    warmup_steps: int = Field(200, ge=0, description="Steps up to the peak; then half a cosine.")
    label_width: FiniteFloat = Field(
        0.0,
        ge=0,
        description="Spread labels over neighbouring bins: standard deviation in bins; "
        "0 = as published.",
    )
    whole_chunks: bool = Field(
        False,
        description="Count the actions behind a perturbation as labels, too, standing still.",
    )
    shift: int = Field(0, ge=0, description="Most pixels that a picture is shifted by.")
    recolour: FiniteFloat = Field(0.05, ge=0, description="Strength of random changes of colour.")
    eval_every: int = Field(0, ge=0, description="Steps between evaluations; 0 = none.")
    stop_at: FiniteFloat | None = Field(
        None, ge=0, le=1, description="Success rate of an evaluation after which it ends."
    )
    save_every: int = Field(2000, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(50, ge=1, description="Steps between lines of metrics.jsonl.")


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = Field(0, ge=0, description="0 = train all weights.")
    alpha: FiniteFloat | None = Field(None, gt=0, description="Scale is alpha / rank; none = rank.")
    targets: Literal["effective", "published"] = Field(
        "effective",
        description="Matrices with an adapter: those that can change an action, or the published "
        "list, some of which never get a gradient.",
    )
    adapter: str = Field(
        "", description="Directory of an adapter (PEFT) of this rank to start from."
    )


class TrainConfig(Section):
    """Length, precision and safety of training."""

    max_steps: int = Field(1000, ge=1, description="RL steps.")
    seed: int = Field(
        1234, ge=0, lt=2**63, description="Of initial weights, episodes and sampling."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="What the policy computes in."
    )
    master_weights: bool = Field(
        True,
        description="Where all weights are trained in bfloat16, the optimizer works on float32 "
        "ones; adapters are kept in train.dtype.",
    )
    sharding: bool = Field(
        True,
        description="Where all weights are trained, share parameters, gradients and optimizer "
        "among the actor ranks (FSDP2); false = every actor rank holds everything.",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="Recompute in the backward pass: nothing, every second layer, or all layers.",
    )
    offload: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Keep in host memory what rollouts do not use: always = optimizer and sharded "
        "weights; auto = the optimizer, where rollouts would not fit otherwise.",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="1 = rollouts of a step run while the policy is updated on the step before; "
        "needs actors on devices of their own.",
    )
    check_weights_every: int = Field(
        20,
        ge=1,
        description="Steps between comparisons of checksums of the weights that different ranks "
        "hold; they are always compared at the start.",
    )
    max_mismatch_kl: FiniteFloat = Field(
        0.1,
        gt=0,
        description="KL, per token, between the policy that acted and the same weights in the "
        "update; more than this stops the run. With train.staleness, seen in the first step only.",
    )
    max_restarts: int = Field(
        2, ge=0, description="Restarts from the last checkpoint after a crash without progress."
    )
    hang_timeout: FiniteFloat = Field(
        50.0,
        gt=0,
        description="Seconds without progress after which a rank that waits for no other counts "
        "as hung; starting and saving may take ten minutes in any case.",
    )


class EvalConfig(Section):
    """Evaluation during training, and the defaults of `vlactl eval`."""

    every: int = Field(0, ge=0, description="Steps between evaluations; 0 = none.")
    trials: Indices = Field(
        None, description="Initial states to evaluate on; none = all of the benchmark's own."
    )
    greedy: bool = Field(False, description="Most likely tokens instead of sampling.")
    temperature: FiniteFloat | None = Field(None, gt=0, description="None = the rollout's.")
    top_k: int = Field(0, ge=0, description="Sample among the best tokens only; 0 = among all.")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Of sampling and of what simulators draw in evaluations, whatever the run's "
        "seed: so that evaluations of different runs differ in the policy only.",
    )


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: int = Field(25, ge=0, description="Steps between checkpoints; 0 = only the last step.")
    keep: int = Field(3, ge=1, description="Complete checkpoints that stay on disk.")
    max_seconds: FiniteFloat = Field(300.0, gt=0, description="Grace for saving after SIGTERM.")
    background: bool = Field(True, description="Write while training goes on.")
    max_failures: int = Field(
        3, ge=0, description="Checkpoints in a row that may fail (a full disk) before the run ends."
    )


class PlacementConfig(Section):
    """Devices of each role: "all", or ranges such as "0-7" or "0-3,8"."""

    env: str = "all"
    rollout: str = "all"
    actor: str = "all"


class RunConfig(Section):
    """A whole run: what a preset and `--set` resolve to."""

    summary: str = Field("", description="One line for `vlactl presets list`.")
    run_name: RunName = Field(description="Folder under runs/; the preset's name unless set.")
    env: SerializeAsAny[EnvironmentConfig]
    model: SerializeAsAny[ModelConfig]
    algorithm: SerializeAsAny[AlgorithmConfig]
    lora: LoraConfig = LoraConfig()
    rollout: RolloutConfig = RolloutConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sft: SupervisedConfig = SupervisedConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    placement: PlacementConfig = PlacementConfig()
    sinks: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        ("tensorboard",),
        description='Mirrors of metrics.jsonl, e.g. ["tensorboard", "wandb"]; there are also '
        '"swanlab" and "trackio".',
    )


RESUMABLE_KEYS = frozenset(
    {
        "train.max_steps",
        "train.max_restarts",
        "train.hang_timeout",
        "model.path",
        "lora.adapter",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.max_seconds",
        "checkpoint.background",
        "checkpoint.max_failures",
        "optim.micro_batch_size",
        "placement.actor",
        "placement.env",
        "placement.rollout",
        "rollout.max_restarts_per_step",
        "rollout.pipeline_stages",
        "train.activation_checkpointing",
        "train.check_weights_every",
        "train.offload",
        "eval.every",
        "sft.stop_at",
        "sft.eval_every",
        "sft.save_every",
        "sinks",
    }
)
