"""Demonstrations of LIBERO's tasks: the scripted expert in the simulators that policies act in.

Now and then the arm is pushed for a few steps, and the expert shows how to go on from there: a
policy that only ever saw undisturbed demonstrations would not know what to do after its first
mistake. Pushes are not to be learned from, and are marked.

Importing this module imports the simulator: only simulator processes do.
"""

from __future__ import annotations

import numpy as np

from vlactl.api.contracts import (
    ChunkResult,
    Demonstration,
    DemonstrationContext,
    EnvContext,
    Episode,
    Observation,
)
from vlactl.api.noise import generator
from vlactl.errors import ConfigError
from vlactl_libero.core import FastStage
from vlactl_libero.expert.expert import Expert
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.simulator import LiberoSimulator
from vlactl_libero.tasks import LiberoTask
from vlactl_libero.workshop import workshop

UNDISTURBED = 0.25
"""Of the episodes."""
USUAL_STEPS = 100
"""Of an episode: what "bursts per episode" refers to."""
MAX_BURSTS = 4
REST_STEPS = 15
"""Between the beginnings of two bursts, at least."""
BURST_STEPS = (3, 9)
"""The shortest, and one more than the longest."""
EARLY = 0.5
"""Of the disturbed episodes begin with a burst."""
SHIFT, TILT, TURN = 0.7, 0.15, 0.3
"""Standard deviations of a push: translation, rotation about x and y, rotation about z."""
OPEN = -1.0


def make_demonstrator(config: LiberoConfig, context: DemonstrationContext) -> LiberoDemonstrator:
    """An expert with a simulator of its own.

    Raises:
        ConfigError: the configuration asks for stock's simulator, which the expert cannot read.
    """
    if config.backend != "fast":
        raise ConfigError("the scripted expert needs the fast core", hint='env.backend = "fast"')
    return LiberoDemonstrator(config, context)


class LiberoDemonstrator:
    """See `vlactl.api.contracts.Demonstrator`."""

    def __init__(self, config: LiberoConfig, context: DemonstrationContext) -> None:
        config = config.model_copy(update={"ignore_terminations": False})
        self._shop = workshop(config.image_size, bool(context.cameras), config.task_cache)
        self._simulator = LiberoSimulator(
            config, EnvContext(num_slots=1, cameras=context.cameras), self._open
        )
        self._cameras, self._bursts = context.cameras, context.bursts
        self._expert: Expert | None = None

    def demonstrate(self, task: int, seed: int, trial: int | None = None) -> Demonstration:
        """Play an episode until the task is solved or time is up."""
        result = self._begin(task, seed, trial)
        expert, pushes = self._ready_expert(), _Pushes(seed, self._bursts)
        recorded = _Recording()
        while result.outcome is None:
            assert result.observation is not None
            push = pushes.next(len(recorded.actions), expert.can_be_disturbed)
            action = expert.act() if push is None else np.append(push, recorded.gripper)
            recorded.add(result.observation, action, is_push=push is not None)
            result = self._simulator.advance(action[None])
        return recorded.as_demonstration(self._cameras, result.outcome.success)

    def close(self) -> None:
        """Leave the task."""
        self._simulator.close()

    def _open(self, task: LiberoTask) -> FastStage:
        stage = self._shop.open(task)
        self._expert = stage.expert()
        return stage

    def _begin(self, task: int, seed: int, trial: int | None) -> ChunkResult:
        if trial is None:
            return self._simulator.begin_sampled(task, seed)
        return self._simulator.begin(Episode(task=task, trial=trial, group=0, member=0, seed=seed))

    def _ready_expert(self) -> Expert:
        assert self._expert is not None, "no stage is open"
        self._expert.reset()
        return self._expert


class _Pushes:
    """When the arm is pushed in an episode, and how."""

    def __init__(self, seed: int, per_episode: float) -> None:
        self._random = generator("pushes", seed)
        is_disturbed = per_episode > 0 and self._random.random() >= UNDISTURBED
        self._gap = USUAL_STEPS / per_episode if is_disturbed else np.inf
        self._count = self._left = 0
        self._push = np.zeros(6)
        starts_early = self._random.random() < EARLY
        self._due = 0.0 if is_disturbed and starts_early else self._draw_gap()

    def next(self, step: int, allowed: bool) -> np.ndarray | None:
        """The push of a step, float64 [6]; None = none. One begins only where it is allowed."""
        if not self._left and allowed and step >= self._due and self._count < MAX_BURSTS:
            self._begin(step)
        if not self._left:
            return None
        self._left -= 1
        return self._push

    def _begin(self, step: int) -> None:
        random = self._random
        self._count += 1
        self._left = int(random.integers(*BURST_STEPS))
        self._due = step + REST_STEPS + self._draw_gap()
        spread = np.array([SHIFT] * 3 + [TILT] * 2 + [TURN])
        self._push = np.clip(random.normal(0.0, spread), -1.0, 1.0)

    def _draw_gap(self) -> float:
        return float(self._random.exponential(self._gap)) if np.isfinite(self._gap) else np.inf


class _Recording:
    """What has been seen and done in the running episode."""

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []
        self._seen: list[Observation] = []
        self._is_push: list[bool] = []

    @property
    def gripper(self) -> float:
        """Its last command."""
        return float(self.actions[-1][-1]) if self.actions else OPEN

    def add(self, seen: Observation, action: np.ndarray, *, is_push: bool) -> None:
        """Note a step."""
        self._seen.append(seen)
        self.actions.append(action)
        self._is_push.append(is_push)

    def as_demonstration(self, cameras: tuple[str, ...], success: bool) -> Demonstration:
        """All steps."""
        return Demonstration(
            images={name: np.stack([each.images[name] for each in self._seen]) for name in cameras},
            states_TP=np.stack([each.state for each in self._seen]),
            actions_TA=np.stack(self.actions),
            perturbed_T=np.array(self._is_push),
            success=success,
        )
