"""One process that makes demonstrations: to `SimulatorPool` a simulator that plays at one go.

The pool's processes, time limits and replacements serve demonstrations as they serve rollouts. An
episode's `member` is the number of the attempt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from vlactl.api.contracts import (
    ChunkResult,
    Demonstration,
    DemonstrationContext,
    Demonstrator,
    EnvContext,
    Episode,
    Outcome,
)
from vlactl.api.plugins import EnvironmentConfig, load_object
from vlactl.demonstrations.staging import Attempt, stage
from vlactl.errors import UserError


class PlayerConfig(EnvironmentConfig):
    """What a process is to do; pickled, never read from a file.

    Attributes:
        env: the environment's own section.
        demonstrator: "module:function" of its demonstrator.
        context: cameras, device, perturbations.
        folder: where attempts are kept; None = nowhere, and official initial states are played.
        fps: control steps per second.
    """

    name: Literal["player"] = "player"
    env: EnvironmentConfig
    demonstrator: str
    context: DemonstrationContext
    folder: Path | None
    fps: float


def make_player(config: PlayerConfig, context: EnvContext) -> Player:
    """The player of a process."""
    return Player(config)


class Player:
    """Plays whole demonstrations; see `vlactl.api.contracts.Simulator`."""

    def __init__(self, config: PlayerConfig) -> None:
        self._config = config
        make = load_object(config.demonstrator)
        self._demonstrator: Demonstrator = make(config.env, config.context)
        self._has_played = False

    def begin(self, episode: Episode) -> ChunkResult:
        """Make a demonstration and keep it, or play an official initial state."""
        folder = self._config.folder
        trial = episode.trial if folder is None else None
        demonstration = self._demonstrate(episode, trial)
        _check(demonstration, self._config.context.cameras)
        if folder is not None:
            attempt = Attempt(
                task=episode.task,
                number=episode.member,
                seed=episode.seed,
                success=demonstration.success,
                num_steps=demonstration.num_steps,
            )
            stage(folder, attempt, demonstration, self._config.fps)
        return ChunkResult(rewards=np.zeros(0, np.float32), outcome=_outcome(demonstration))

    def advance(self, actions_KA: np.ndarray) -> ChunkResult:
        """Nothing may be advanced: an episode has ended when `begin` returns."""
        raise RuntimeError("a demonstration ends within begin")

    def close(self) -> None:
        """Free the demonstrator."""
        self._demonstrator.close()

    def _demonstrate(self, episode: Episode, trial: int | None) -> Demonstration:
        try:
            demonstration = self._demonstrator.demonstrate(episode.task, episode.seed, trial)
        except UserError as error:
            if not self._has_played:
                raise
            # What has gone well before is no fault of the machine: this costs the attempt only.
            raise RuntimeError(str(error)) from error
        self._has_played = True
        return demonstration


def _outcome(demonstration: Demonstration) -> Outcome:
    success, num_steps = demonstration.success, demonstration.num_steps
    return Outcome(
        success_step=num_steps if success else None,
        success_at_end=success,
        terminated=success,
        num_steps=num_steps,
    )


def _check(demonstration: Demonstration, cameras: tuple[str, ...]) -> None:
    """Refuse what cannot be stored; authors of demonstrators see this."""
    arrays = {
        "states_TP": demonstration.states_TP,
        "perturbed_T": demonstration.perturbed_T,
        **{name: demonstration.images[name] for name in cameras},
    }
    for name, array in arrays.items():
        if len(array) != demonstration.num_steps:
            raise ValueError(f"{name}: {len(array)} steps, actions_TA: {demonstration.num_steps}")
    for name in cameras:
        if demonstration.images[name].dtype != np.uint8:
            raise ValueError(f"pictures of {name} are {demonstration.images[name].dtype}")
    for numbers in (demonstration.states_TP, demonstration.actions_TA):
        if not np.isfinite(numbers).all():
            raise ValueError("a state or an action is not finite")
