"""Episodes of LIBERO in one process: what `SimulatorPool` drives.

The scene of the current task is kept: an episode of the same task restores it, another rebuilds.
Pictures are rendered once per action chunk, during its last action, and for films at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlactl.api.contracts import ChunkResult, EnvContext, Episode, Observation, Outcome
from vlactl.errors import IntegrityError
from vlactl_libero.init_states import read_state
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.rewards import Rewards
from vlactl_libero.scene import Scene
from vlactl_libero.tasks import ACTION_DIM, LiberoTask, max_episode_steps, suite_tasks


def make_simulator(config: LiberoConfig, context: EnvContext) -> LiberoSimulator:
    """A simulator without a scene yet: the first episode builds one."""
    return LiberoSimulator(config, context)


@dataclass(slots=True)
class _Progress:
    """What is remembered of the running episode."""

    instruction: str
    rewards: Rewards
    num_steps: int = 0
    solved: bool = False
    solved_once: bool = False


class LiberoSimulator:
    """Plays one episode at a time."""

    def __init__(self, config: LiberoConfig, context: EnvContext) -> None:
        self._config = config
        self._cameras = context.cameras
        self._film = context.cameras[:1] if context.render_every_step else None
        self._horizon = max_episode_steps(config)
        self._wait_action = np.zeros(ACTION_DIM)
        if config.reset_gripper_open:
            self._wait_action[-1] = -1.0
        self._task: LiberoTask | None = None
        self._scene: Scene | None = None
        self._progress: _Progress | None = None

    def begin(self, episode: Episode) -> ChunkResult:
        """Restore the episode's initial state, let the scene settle and observe."""
        task = suite_tasks(self._config.suite)[episode.task]
        init_state = read_state(task.init_file, episode.trial)
        scene = self._enter(task)
        if len(init_state) != scene.state_length:
            raise IntegrityError(
                f"{task.init_file} has states of {len(init_state)} numbers: "
                f"{scene.state_length} fit the task {task.name}"
            )
        waits = self._config.wait_steps
        scene.restore(init_state, None if waits else self._cameras)
        for step in range(waits):
            scene.step(self._wait_action, self._cameras if step == waits - 1 else None)
        self._progress = _Progress(task.instruction, Rewards(self._config, scene.reach()))
        return ChunkResult(rewards=np.zeros(0, np.float32), observation=self._observation())

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Run actions until the chunk or the episode ends."""
        assert self._scene is not None
        assert self._progress is not None, "advance without a running episode"
        rewards: list[float] = []
        frames: list[np.ndarray] = []
        last = len(actions_KA) - 1
        for index, action in enumerate(actions_KA):
            rewards.append(self._step(action, observed=index == last))
            if self._film:
                frames.append(self._scene.pictures[self._film[0]])
            if self._over():
                break
        outcome = self._outcome() if self._over() else None
        return ChunkResult(
            rewards=np.array(rewards, np.float32),
            observation=None if outcome else self._observation(),
            outcome=outcome,
            frames=frames,
        )

    def close(self) -> None:
        """Free the scene."""
        if self._scene is not None:
            self._scene.close()
        self._scene = self._task = None

    def _enter(self, task: LiberoTask) -> Scene:
        if self._scene is None or task != self._task:
            self.close()
            config = self._config
            self._scene = Scene(task.bddl_file, config.image_size, config.fixture_seed)
            self._task = task
        return self._scene

    def _step(self, action: np.ndarray, *, observed: bool) -> float:
        progress = self._progress
        cut = progress.num_steps + 1 == self._horizon
        cameras = self._cameras if observed and not cut else self._film
        progress.solved = self._scene.step(action, cameras)
        progress.solved_once |= progress.solved
        progress.num_steps += 1
        return progress.rewards.step(progress.solved, self._scene.reach())

    def _over(self) -> bool:
        return self._terminated() or self._progress.num_steps == self._horizon

    def _terminated(self) -> bool:
        return self._progress.solved and not self._config.ignore_terminations

    def _observation(self) -> Observation:
        return Observation(
            images=self._scene.pictures,
            state=self._scene.state,
            instruction=self._progress.instruction,
        )

    def _outcome(self) -> Outcome:
        progress = self._progress
        return Outcome(
            success=progress.solved_once,
            success_at_end=progress.solved,
            terminated=self._terminated(),
            num_steps=progress.num_steps,
        )
