"""The contracts between the engine and its plugins: what each side hands to the other.

The engine knows episodes, observations, actions, log-probabilities and rewards. It knows no
simulator (an `Environment` does), no network (a `Policy` does) and no formula (an `Algorithm`
does). This module imports neither torch nor numpy, so that command line and descriptors stay
cheap.

Shapes:
    B  trajectories, or observations in one inference batch
    T  control steps of an episode
    S  samples of a micro-batch: one sample is one inference call, i.e. one action chunk
    C  chunks of a trajectory
    K  actions of a chunk
    A  dimensions (and tokens) of one action
    P  dimensions of the proprioceptive state
Images are uint8 `[H, W, 3]` RGB in the orientation the policy was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

API_VERSION = 1

ValueLevel = Literal["none", "action", "chunk"]
"""Value heads: none, one value per action of the chunk, or one for the whole chunk."""

Recomputation = Literal["none", "selective", "full"]
"""Of activations in the backward pass: none, those of every second layer, or of all layers."""


# --------------------------------------------------------------------------------------------
# Environment
# --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of an environment.

    Attributes:
        index: of the task in `EnvSpec.tasks`.
        name: unique.
        instruction: what the robot is told.
        num_trials: initial states.
        num_eval_trials: how many of them, the first ones, an evaluation uses unless `eval.trials`
            says otherwise: those of the benchmark, where there are more to train on; None = all.
    """

    index: int
    name: str
    instruction: str
    num_trials: int
    num_eval_trials: int | None = None

    @property
    def eval_trials(self) -> range:
        """The initial states of an evaluation that does not ask for others."""
        return range(self.num_trials if self.num_eval_trials is None else self.num_eval_trials)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSpec:
    """What an environment offers, known without starting a simulator.

    Attributes:
        cameras: every camera it can render, name -> (height, width) in pixels.
        state_dim: P.
        action_dim: A.
        max_episode_steps: control steps after which an episode is truncated.
        control_hz: control steps per second of simulated time.
        tasks: all tasks, in index order.
        gripper: dimension of an action that commands a gripper, -1 open to 1 closed; the others
            are changes, and 0 stands still. None = there is no such dimension.
    """

    cameras: Mapping[str, tuple[int, int]]
    state_dim: int
    action_dim: int
    max_episode_steps: int
    control_hz: float
    tasks: tuple[Task, ...]
    gripper: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One episode to play, named by meaning: nothing here depends on rank, slot or timing.

    Attributes:
        task: index into `EnvSpec.tasks`.
        trial: index of the initial state within the task.
        group: episodes of one group share task and trial; their returns are compared. With
            `rollout.auto_reset` they share the task only, and follow one another.
        member: index within the group.
        seed: 63-bit key of everything random in this episode, derived from (run seed, step,
            task, trial, group, member) and, of a group that replaces another, the round.
    """

    task: int
    trial: int
    group: int
    member: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the policy sees before an action chunk."""

    images: Mapping[str, np.ndarray]
    """Camera name -> uint8 [H, W, 3]; only the cameras the policy asked for."""
    state: np.ndarray
    """float32 [P]."""
    instruction: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an episode ended."""

    success_step: int | None
    """Control steps after which the task was solved for the first time; None = never."""
    success_at_end: bool
    """The task was solved at the last step."""
    terminated: bool
    """Ended by success; False when it was cut at the horizon."""
    num_steps: int
    """Control steps executed; steps that only let the scene settle are not counted."""

    @property
    def success(self) -> bool:
        """The task was solved at some step (`success_once`)."""
        return self.success_step is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkResult:
    """What running one action chunk (or starting an episode) led to.

    Exactly one of `observation` and `outcome` is set; with `EnvContext.final_observations` an
    outcome comes with the observation that follows the episode's last action.
    """

    rewards: np.ndarray
    """float32 [n], n <= K: one per action that was executed; empty when the episode has just
    begun."""
    observation: Observation | None = None
    outcome: Outcome | None = None
    frames: Sequence[np.ndarray] = ()
    """uint8 [H, W, 3] per executed action; only when every step is rendered for a film."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotEvent:
    """Something happened in a slot: a result is there, or the simulator failed.

    After a failure the slot is free and usable again; the caller decides whether the episode is
    redone.
    """

    slot: int
    result: ChunkResult | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvContext:
    """What the engine tells an environment when it builds one on a rank."""

    num_slots: int
    """Episodes that run at the same time on this rank."""
    cameras: tuple[str, ...]
    """Cameras to render: only these, once per chunk."""
    device_index: int = -1
    """GPU to render on, as numbered by CUDA within this process; -1 = none."""
    render_every_step: bool = False
    """Also return a frame of the first camera for every control step (films)."""
    final_observations: bool = False
    """Also observe after the last action of an episode, for algorithms that value that state."""


class Environment(Protocol):
    """Simulators behind numbered slots. One per env rank, called from one thread.

    Building one checks that this machine can run it, and starts no simulator before the first
    `begin`.
    Every call but `wait` returns at once. Between `begin` and its outcome a slot alternates between
    "busy" and "observation delivered"; `begin` on a slot in either state drops the old episode.
    """

    spec: EnvSpec

    def begin(self, slot: int, episode: Episode) -> None:
        """Restore the episode's initial state, let it settle and observe."""

    def advance(self, slot: int, actions_KA: np.ndarray) -> None:
        """Run one action chunk (float64 [K, A]); stop early at the end of the episode."""

    def wait(self, at_least: int, timeout: float) -> list[SlotEvent]:
        """Collect events until there are `at_least`, or `timeout` seconds have passed."""

    def close(self) -> None:
        """Stop all simulators. May be called twice."""


class Simulator(Protocol):
    """One simulator inside a subprocess: what most environment authors write.

    `vlactl.api.simulators.SimulatorPool` turns a factory of these into an `Environment`, with
    processes, shared-memory pictures, timeouts and restarts. Instances must be rebuildable from
    the same config: the same episode and actions give the same results in every process.

    All calls to an instance, its construction and `close` included, come from one thread. Unless
    the environment gives the pool a number of processes, that is the only instance in its process;
    otherwise others live there at the same time, each in its own thread. They are constructed one
    after another.
    """

    def begin(self, episode: Episode) -> ChunkResult:
        """Start the episode and observe it."""

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Run up to K actions and observe after the last, or report the outcome."""

    def close(self) -> None:
        """Free what the simulator holds."""


# --------------------------------------------------------------------------------------------
# Demonstrator
# --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationContext:
    """What the engine tells a demonstrator when it builds one in a process."""

    cameras: tuple[str, ...]
    """Cameras to record; none = only how episodes end matters."""
    device_index: int = -1
    """GPU to render on, as numbered by CUDA within this process; -1 = none."""
    bursts: float = 0.0
    """How often an episode of usual length is disturbed, about, 0 to 4: by something random for a
    few steps, after which the demonstrator shows how to recover. A quarter of the episodes never
    is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """One episode of a demonstrator, with what was seen before each of its actions."""

    images: Mapping[str, np.ndarray]
    """Camera name -> uint8 [T, H, W, 3]; only the cameras that the context names."""
    states_TP: np.ndarray
    """float32."""
    actions_TA: np.ndarray
    """float64, as the simulator takes them."""
    perturbed_T: np.ndarray
    """bool, of actions that disturb on purpose: executed, but nothing to learn from."""
    success: bool
    """The task was solved, by the last action."""

    @property
    def num_steps(self) -> int:
        """Control steps executed; steps that only let the scene settle are not counted."""
        return len(self.actions_TA)


class Demonstrator(Protocol):
    """A scripted expert with simulators of its own: shows how tasks are solved.

    It lives in a process of its own. The same arguments give the same episode in every process.
    """

    def demonstrate(self, task: int, seed: int, trial: int | None = None) -> Demonstration:
        """Play an episode until the task is solved or time is up.

        Args:
            task: index into `EnvSpec.tasks`.
            seed: 63-bit key of everything random in the episode.
            trial: index of the initial state within the task. None = one that the task's own
                sampler draws from the seed, never one that policies are evaluated on.
        """

    def close(self) -> None:
        """Free what its simulators hold."""


# --------------------------------------------------------------------------------------------
# Policy
# --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationBatch:
    """Observations stacked on a leading axis: images uint8 [B, H, W, 3], state float32 [B, P]."""

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)


@dataclass(frozen=True, slots=True)
class Sample:
    """Draw every token from softmax(logits / temperature), of its `top_k` best (0 = of all)."""

    temperature: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Greedy:
    """Take the most likely token; log-probabilities are those at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionChunks:
    """What `act` returns, on the CPU."""

    actions_BKA: np.ndarray
    """float64, as the simulator expects them."""
    tokens_BKA: np.ndarray | None
    """int64, what was drawn; None for policies that can be evaluated but not trained."""
    logprobs_BKA: np.ndarray | None
    """float32, of the drawn tokens under the distribution they were drawn from."""
    values_BK: np.ndarray | None = None
    """float32 state values, one per action (or [B, 1] per chunk), for policies with a value
    head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Samples whose log-probabilities are wanted again, with gradient."""

    observations: ObservationBatch
    tokens_SKA: torch.Tensor
    """int64 on the policy's device."""
    temperature: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedBatch:
    """Demonstrated action chunks, to be imitated."""

    observations: ObservationBatch
    actions_SKA: np.ndarray
    """float32, as the simulator takes them (`ActionChunks.actions_BKA`)."""
    valid_SK: np.ndarray
    """bool: actions after the end of what was demonstrated do not count."""
    label_width: float = 0.0
    """Standard deviation, in bins, of the Gaussian that a label is spread over its neighbours
    with; 0 = the whole label lies on one bin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOutput:
    """What `evaluate_actions` returns: float32, with gradient."""

    logprobs_SKA: torch.Tensor
    entropy_SKA: torch.Tensor
    values_SK: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraContext:
    """Adapters that are trained instead of the weights."""

    rank: int
    alpha: float
    """The update of a matrix is alpha / rank * B A."""
    targets: Literal["effective", "published"] = "effective"
    """Matrices that get one: those that can change an action, or the published list."""
    adapter: str = ""
    """Directory of an adapter in PEFT's format to start from; "" = fresh ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelContext:
    """What the engine tells a model when it builds one on a rank."""

    env: EnvSpec
    device: torch.device
    dtype: torch.dtype
    """Of the parameters."""
    seed: int
    """Of the initial weights where there is no checkpoint; the same on all ranks."""
    values: ValueLevel = "none"
    """The value head that the algorithm needs."""
    lora: LoraContext | None = None
    """None = all weights are trained."""
    reference: bool = False
    """`reference_logprobs` will be asked for."""
    activation_checkpointing: Recomputation = "none"
    """What the backward pass computes again instead of keeping it."""
    for_export: bool = False
    """Only `export` will be called: weights stay as precise as they are stored."""
    statistics: Mapping[str, Any] | None = None
    """Of the demonstrations that the policy imitates, in OpenVLA's form (name -> "action" and
    "proprio" -> q01, q99, mask): they take the place of those beside its weights."""


class Policy(Protocol):
    """A network that turns observations into action tokens."""

    module: nn.Module
    """Holds all parameters; its state dict is what checkpoints store."""

    def act(
        self, batch: ObservationBatch, mode: Sample | Greedy, noise_keys: Sequence[int]
    ) -> ActionChunks:
        """Choose an action chunk per observation, without gradient.

        `noise_keys` holds one 63-bit key per row. All randomness of a row comes from its key
        (`vlactl.api.noise.uniform`), so a row's tokens do not depend on who else is in the batch.
        """

    def evaluate_actions(self, batch: TrainBatch) -> PolicyOutput:
        """Log-probabilities, entropy and values of given tokens; must agree with `act`."""

    def reference_logprobs(self, batch: TrainBatch) -> torch.Tensor:
        """Log-probabilities [S, K, A] of given tokens under the initial policy, no gradient.

        The initial policy is the one before the run's first update: what the factory returned.
        """

    def supervised_loss(self, batch: SupervisedBatch) -> torch.Tensor:
        """Mean cross-entropy per valid action token of demonstrated chunks, with gradient.

        Raises:
            ConfigError: this policy cannot imitate, as it is configured.
        """

    def shard_units(self) -> Sequence[nn.Module]:
        """Modules that `fully_shard` wraps one by one, innermost first."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is optimised, synchronised and stored as the policy's own."""

    def export(self, directory: Path, *, adapter_only: bool) -> None:
        """Write a directory (which exists and is empty) that the factory reads again.

        Args:
            directory: where to.
            adapter_only: of a policy with adapters, only these, in PEFT's format; else they are
                merged into the weights.

        Raises:
            UserError: there is no such format for this policy.
        """


# --------------------------------------------------------------------------------------------
# Algorithm
# --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an algorithm asks the engine for."""

    values: ValueLevel = "none"
    """A value head."""
    final_values: bool = False
    """Values of the states that episodes end in, for bootstrapping."""
    reference: bool = False
    """Log-probabilities of a frozen reference policy."""
    resample_rounds: int = 0
    """Rounds in which groups that teach nothing (`useful_groups`) are replaced by new ones."""
    critic_warmup_steps: int = 0
    """First steps of a run in which only the value head is trained."""


class End(IntEnum):
    """What follows an action in a row of a `TrajectoryBatch`."""

    NONE = 0
    """The episode goes on in the row's next valid action."""
    SUCCESS = 1
    TRUNCATED = 2
    """The episode was cut at its horizon."""
    CUT = 3
    """The row is full (`rollout.auto_reset`); the episode would have gone on."""


class Reduce(Protocol):
    """Sums over all actor ranks; the identity where there is one. Every rank must call it."""

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over actor ranks (a new tensor)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryBatch:
    """All trajectories of a step on this actor rank, whole groups, ordered by (group, member).

    Row-major over groups: rows i*G .. i*G+G-1 are one group. C and K are those of the horizon, so
    entries after the end of an episode are padding: `valid_BCK` is False there. With
    `rollout.auto_reset` a row holds one episode after the other, until it is full; each begins
    with a new chunk.
    """

    rewards_BCK: torch.Tensor
    valid_BCK: torch.Tensor
    """bool: the action was executed before the episode ended (the one that ended it included)."""
    ends_BCK: torch.Tensor
    """int8: an `End` per action."""
    group_size: int
    values_BCK: torch.Tensor | None = None
    """float32 [B, C, K], or [B, C, 1] for one value per chunk; 0 where nothing was observed."""
    final_values_BCK: torch.Tensor | None = None
    """float32: at ends, the (first) value of the state after the action; 0 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What `Algorithm.advantages` returns.

    The last axis may have length 1: one entry per chunk.

    Attributes:
        advantages_BCK: float32.
        mask_BCK: bool, entries that are trained on.
        returns_BCK: targets of the value head, or None.
        metrics: scalars for `rollout/...`, already reduced over ranks.
    """

    advantages_BCK: torch.Tensor
    mask_BCK: torch.Tensor
    returns_BCK: torch.Tensor | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples of one backward pass with all that the loss needs (no observations).

    The K axis of advantages, mask, weights and returns is that of `Advantages`: K or 1.
    """

    old_logprobs_SKA: torch.Tensor
    advantages_SK: torch.Tensor
    mask_SK: torch.Tensor
    weights_SK: torch.Tensor
    """What an action's loss counts in the optimizer step; from `Algorithm.weights`."""
    returns_SK: torch.Tensor | None = None
    old_values_SK: torch.Tensor | None = None
    reference_logprobs_SKA: torch.Tensor | None = None
    critic_only: bool = False
    """Within `Needs.critic_warmup_steps`: the loss must be that of the values alone."""
    lags_S: torch.Tensor | None = None
    """float32: updates between the policy that acted and the one at the start of the step, where
    any sample has some (`train.staleness`); None = all acted with the latter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """A loss that adds up: over micro-batches and ranks the sum is the optimizer step's loss.

    `parts` are named terms that add up in the same way (`actor/policy_loss`). `metrics` maps a
    name (`actor/approx_kl`) to (sum, count) so that it can be averaged over anything.
    """

    loss: torch.Tensor
    parts: Mapping[str, torch.Tensor]
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class Algorithm(Protocol):
    """Advantages and loss: pure tensor functions in float32.

    What it needs is told by its configuration, `AlgorithmConfig.needs`.
    """

    def useful_groups(self, batch: TrajectoryBatch) -> torch.Tensor:
        """Which groups something can be learned from: bool [N]. Asked for `resample_rounds`."""

    def advantages(self, batch: TrajectoryBatch, reduce: Reduce) -> Advantages:
        """Advantages of all trajectories of the step; called on every actor rank."""

    def weights(
        self,
        mask_SK: torch.Tensor,
        valid_actions_S: torch.Tensor,
        num_slots: int,
        max_episode_steps: int,
        reduce: Reduce,
    ) -> torch.Tensor:
        """Weight of each entry of the mask in one optimizer step, float32 [S, K].

        Args:
            mask_SK: entries trained on, of this rank's samples in the optimizer step.
            valid_actions_S: executed actions of the whole row that the sample belongs to.
            num_slots: samples of the optimizer step over all ranks, with those that were padding.
            max_episode_steps: horizon in control steps.
            reduce: sums over actor ranks.
        """

    def loss(self, out: PolicyOutput, batch: MicroBatch) -> LossTerms:
        """Weighted loss of one micro-batch."""

    def derived_metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Metrics computed from the means over a step of what `loss` reported; may be empty."""


# --------------------------------------------------------------------------------------------
# Sink
# --------------------------------------------------------------------------------------------
class Sink(Protocol):
    """A mirror of `metrics.jsonl`; it may fail without stopping the run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a finished step."""

    def close(self) -> None:
        """Flush."""
