"""Episodes of LIBERO in one process: what `SimulatorPool` drives.

The scene of the current task is kept: an episode of the same task restores it, another rebuilds.
Pictures are rendered once per action chunk, during its last action, and for films at every step.
"""

from __future__ import annotations

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


class LiberoSimulator:
    """Plays one episode at a time."""

    def __init__(self, config: LiberoConfig, context: EnvContext) -> None:
        self._config = config
        self._cameras = context.cameras
        self._film = context.cameras[:1] if context.render_every_step else None
        self._task: LiberoTask | None = None
        self._scene: Scene | None = None
        self._play: _Play | None = None

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
        self._settle(scene, init_state)
        self._play = _Play(scene, task.instruction, self._config)
        return ChunkResult(rewards=np.zeros(0, np.float32), observation=self._play.observation())

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Run actions until the chunk or the episode ends."""
        play = self._play
        assert play is not None, "advance before begin"
        chunk_KA = actions_KA[: play.steps_left]
        goes_on = len(chunk_KA) < play.steps_left  # else nobody will look at the last picture
        rewards: list[float] = []
        frames: list[np.ndarray] = []
        for index, action in enumerate(chunk_KA):
            is_seen = goes_on and index == len(chunk_KA) - 1
            rewards.append(play.step(action, self._cameras if is_seen else self._film))
            if self._film:
                frames.append(play.scene.pictures[self._film[0]])
            if play.over:
                break
        return ChunkResult(
            rewards=np.array(rewards, np.float32),
            observation=None if play.over else play.observation(),
            outcome=play.outcome() if play.over else None,
            frames=frames,
        )

    def close(self) -> None:
        """Free the scene."""
        if self._scene is not None:
            self._scene.close()
        self._scene = self._task = self._play = None

    def _enter(self, task: LiberoTask) -> Scene:
        if self._scene is None or task != self._task:
            self.close()  # first: a process has one GL context at a time
            config = self._config
            self._scene = Scene(task.bddl_file, config.image_size, config.fixture_seed)
            self._task = task
        return self._scene

    def _settle(self, scene: Scene, init_state: np.ndarray) -> None:
        num_waits = self._config.wait_steps
        action = np.zeros(ACTION_DIM)
        if self._config.reset_gripper_open:
            action[-1] = -1.0
        scene.restore(init_state, None if num_waits else self._cameras)
        for left in reversed(range(num_waits)):
            scene.step(action, None if left else self._cameras)


class _Play:
    """The running episode on its scene."""

    def __init__(self, scene: Scene, instruction: str, config: LiberoConfig) -> None:
        self.scene = scene
        self.steps_left = self._horizon = max_episode_steps(config)
        self._instruction = instruction
        self._goes_on = config.ignore_terminations
        self._rewards = Rewards(config, scene.reach())
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
        """Run one action and return its reward; `cameras` as in `Scene.step`."""
        self._solved = self.scene.step(action, cameras)
        self.steps_left -= 1
        if self._solved and self._success_step is None:
            self._success_step = self._horizon - self.steps_left
        return self._rewards.step(self._solved, self.scene.reach())

    def observation(self) -> Observation:
        """What was sampled last."""
        scene = self.scene
        return Observation(images=scene.pictures, state=scene.state, instruction=self._instruction)

    def outcome(self) -> Outcome:
        """How it ended."""
        return Outcome(
            success_step=self._success_step,
            success_at_end=self._solved,
            terminated=self._terminated,
            num_steps=self._horizon - self.steps_left,
        )
