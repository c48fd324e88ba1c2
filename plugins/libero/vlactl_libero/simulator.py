"""Episodes of LIBERO: what each slot of a `SimulatorPool` plays.

An episode is played on the stage of its task, which the simulator keeps for the next episode.
Pictures are rendered once per action chunk, during its last action, and for films at every step.
Where the end of an episode is observed, too, every step is sampled, but only that one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from vlactl.api.contracts import ChunkResult, EnvContext, Episode, Observation, Outcome
from vlactl.errors import IntegrityError
from vlactl_libero.init_states import count_states, read_state, sampled_seed
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.rewards import Rewards
from vlactl_libero.tasks import ACTION_DIM, LiberoTask, max_episode_steps, suite_tasks


class Stage(Protocol):
    """A task that one simulator plays: `core.FastStage` or `stock.StockStage`."""

    state: np.ndarray
    """float32 [8], last sampled."""

    @property
    def pictures(self) -> Mapping[str, np.ndarray]:
        """Camera -> uint8 [H, W, 3], last sampled."""

    @property
    def state_length(self) -> int:
        """Numbers in an initial state."""

    def draw_state(self, seed: int) -> np.ndarray:
        """An initial state from the task's own sampler, float64 [1 + nq + nv].

        `restore` has to get the same seed for the fixtures, on or in which objects may stand.
        """

    def restore(
        self, init_state: np.ndarray, fixture_seed: int, cameras: Sequence[str] | None = None
    ) -> None:
        """Start from an initial state; sample the state and `cameras` unless None."""

    def step(self, action: np.ndarray, cameras: Sequence[str] | None = None) -> bool:
        """Run one control step, sample as `restore` does, say whether the task is solved."""

    def reach(self) -> float:
        """Metres between the gripper and what the task is about in the first place."""

    def close(self) -> None:
        """Leave the task."""


def make_simulator(config: LiberoConfig, context: EnvContext) -> LiberoSimulator:
    """A simulator without a stage yet: the first episode opens one."""
    # Either backend imports the simulator, which takes seconds.
    if config.backend == "stock":
        from vlactl_libero.stock import StockStage

        return LiberoSimulator(
            config,
            context,
            lambda task: StockStage(task.bddl_file, config.image_size, context.cameras),
        )
    from vlactl_libero.workshop import workshop

    shared = workshop(config.image_size, bool(context.cameras), config.task_cache)
    return LiberoSimulator(config, context, shared.open)


class LiberoSimulator:
    """Plays one episode at a time.

    Args:
        config: the environment's section.
        context: cameras, and whether every step is rendered.
        open_stage: makes the stage of a task.
    """

    def __init__(
        self,
        config: LiberoConfig,
        context: EnvContext,
        open_stage: Callable[[LiberoTask], Stage],
    ) -> None:
        self._config, self._open_stage = config, open_stage
        self._cameras = context.cameras
        self._film = context.cameras[:1] if context.render_every_step else None
        self._observes_ends = context.final_observations
        self._task: LiberoTask | None = None
        self._stage: Stage | None = None
        self._play: _Play | None = None

    def begin(self, episode: Episode) -> ChunkResult:
        """Restore the episode's initial state, let the scene settle and observe."""
        task = suite_tasks(self._config.full_suite)[episode.task]
        stage = self._enter(task)
        return self._begin(stage, task, *self._start(stage, task, episode))

    def begin_sampled(self, task_index: int, seed: int) -> ChunkResult:
        """Like `begin`, from a state that the task's own sampler draws from a seed."""
        task = suite_tasks(self._config.full_suite)[task_index]
        stage = self._enter(task)
        return self._begin(stage, task, stage.draw_state(seed), seed)

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Run actions until the chunk or the episode ends."""
        play = self._play
        assert play is not None, "advance before begin"
        chunk_KA = actions_KA[: play.steps_left]
        goes_on = len(chunk_KA) < play.steps_left  # else nobody looks at the last picture
        rewards: list[float] = []
        frames: list[np.ndarray] = []
        for index, action in enumerate(chunk_KA):
            is_seen = self._observes_ends or (goes_on and index == len(chunk_KA) - 1)
            rewards.append(play.step(action, self._cameras if is_seen else self._film))
            if self._film:
                frames.append(play.stage.pictures[self._film[0]])
            if play.over:
                break
        return ChunkResult(
            rewards=np.array(rewards, np.float32),
            observation=play.observation() if self._observes_ends or not play.over else None,
            outcome=play.outcome() if play.over else None,
            frames=frames,
        )

    def close(self) -> None:
        """Leave the stage."""
        if self._stage is not None:
            self._stage.close()
        self._stage = self._task = self._play = None

    def _begin(
        self, stage: Stage, task: LiberoTask, init_state: np.ndarray, fixture_seed: int
    ) -> ChunkResult:
        self._settle(stage, init_state, fixture_seed)
        self._play = _Play(stage, task.instruction, self._config)
        return ChunkResult(rewards=np.zeros(0, np.float32), observation=self._play.observation())

    def _enter(self, task: LiberoTask) -> Stage:
        if self._stage is None or task != self._task:
            self.close()  # first: stock has one GL context per process at a time
            self._stage, self._task = self._open_stage(task), task
        return self._stage

    def _start(self, stage: Stage, task: LiberoTask, episode: Episode) -> tuple[np.ndarray, int]:
        """The episode's initial state, and the seed of its fixtures' poses."""
        if 0 <= episode.trial - count_states(task.init_file) < self._config.sampled_trials:
            seed = sampled_seed(task.name, episode.trial)
            return stage.draw_state(seed), seed
        init_state = read_state(task.init_file, episode.trial)
        if len(init_state) != stage.state_length:
            raise IntegrityError(
                f"{task.init_file} has states of {len(init_state)} numbers: "
                f"{stage.state_length} fit the task {task.name}"
            )
        return init_state, self._fixture_seed(episode)

    def _fixture_seed(self, episode: Episode) -> int:
        is_fixed = self._config.fixture_poses == "fixed"
        return self._config.fixture_seed if is_fixed else episode.seed

    def _settle(self, stage: Stage, init_state: np.ndarray, fixture_seed: int) -> None:
        num_waits = self._config.wait_steps
        action = np.zeros(ACTION_DIM)
        if self._config.reset_gripper_open:
            action[-1] = -1.0
        stage.restore(init_state, fixture_seed, None if num_waits else self._cameras)
        for left in reversed(range(num_waits)):
            stage.step(action, None if left else self._cameras)


class _Play:
    """The running episode on its stage."""

    def __init__(self, stage: Stage, instruction: str, config: LiberoConfig) -> None:
        self.stage = stage
        self.steps_left = self._horizon = max_episode_steps(config)
        self._instruction = instruction
        self._goes_on = config.ignore_terminations
        self._rewards = Rewards(config, stage.reach())
        self._solved = False
        self._success_step: int | None = None

    @property
    def over(self) -> bool:
        """Ended by success, or cut at the horizon."""
        return self._terminated or self.steps_left == 0

    @property
    def _terminated(self) -> bool:
        return self._solved and not self._goes_on

    def step(self, action: np.ndarray, cameras: tuple[str, ...] | None) -> float:
        """Run one action and return its reward; `cameras` as in `Stage.step`."""
        self._solved = self.stage.step(action, cameras)
        self.steps_left -= 1
        if self._solved and self._success_step is None:
            self._success_step = self._horizon - self.steps_left
        return self._rewards.step(self._solved, self.stage.reach())

    def observation(self) -> Observation:
        """What was sampled last."""
        stage = self.stage
        return Observation(images=stage.pictures, state=stage.state, instruction=self._instruction)

    def outcome(self) -> Outcome:
        """How it ended."""
        return Outcome(
            success_step=self._success_step,
            success_at_end=self._solved,
            terminated=self._terminated,
            num_steps=self._horizon - self.steps_left,
        )
