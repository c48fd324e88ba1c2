"""The expert: which skill makes the next term of a task's goal true."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero.expert.articulated import CloseDrawer, OpenDrawer, PushDoor, TurnKnob
from vlactl_libero.expert.motion import OPEN, reach
from vlactl_libero.expert.pick_place import PickPlace
from vlactl_libero.expert.scene import Scene
from vlactl_libero.expert.skill import ABOVE, Skill
from vlactl_libero.expert.slide import Slide
from vlactl_libero.goals import Goal
from vlactl_libero.task_model import TaskModel

ORDER = ("open", "turnon", "turnoff", "in", "on", "close")
"""Predicates in the order in which they are made true: what is closed is filled before."""
DISTURBABLE = ("", "approach", "descend", "move", "lift", "lower")
"""Phases in which a push does no harm that the expert does not repair."""
WIDE_OPEN = -0.135
"""Joint position to which a drawer is opened, metres, before something is put into it."""
SHUT = -0.10
"""Joint position above which a drawer has to be opened again."""


class Expert:
    """Plays a task of one simulator.

    Args:
        task: what is simulated.
        data: of the simulator; read, never written.

    Attributes:
        phase: what it has just decided to do; "" before the first action of an episode.

    Raises:
        EnvironmentNotReadyError: the goal has a predicate that there is no skill for.
    """

    def __init__(self, task: TaskModel, data: mujoco.MjData) -> None:
        self._scene = Scene(task, data)
        self._upright = task.fresh_memory().goal_rotation.reshape(3, 3)
        terms = [(term, holds) for term, holds in Goal(task.domain, data).terms]
        self._terms = sorted(terms, key=lambda item: _rank(item[0]))
        self.phase = ""
        self.reset()

    def reset(self) -> None:
        """Forget the last episode."""
        self._scene.forget()
        self.phase = ""
        self._opened: set[str] = set()
        self._skills = [self._skill(term) for term, _ in self._terms]
        self._openers = {
            term[2]: OpenDrawer(self._scene, self._upright, term[2])
            for term, _ in self._terms
            if term[0].lower() == "in" and self._is_drawer(term[2])
        }

    @property
    def can_be_disturbed(self) -> bool:
        """Whether a perturbation may start now."""
        return self.phase in DISTURBABLE

    def act(self) -> np.ndarray:
        """The action for the present state: float64 [7] in [-1, 1], as `FastStage.step` takes it.

        After the goal is reached it moves the hand up.
        """
        for (term, holds), skill in zip(self._terms, self._skills, strict=True):
            reached = holds()
            opener = None if reached else self._opener(term)
            if opener is None and reached and not skill.busy:
                continue
            chosen = opener or skill
            action = chosen.act()
            self.phase = chosen.phase
            break
        else:
            self.phase = "done"
            hand = self._scene.hand()
            action = reach(hand, hand.position + 0.05 * ABOVE, self._upright, OPEN)
        limited: np.ndarray = np.clip(action, -1.0, 1.0)
        return limited

    def _opener(self, term: tuple[str, ...]) -> Skill | None:
        """What opens the drawer that something is to be put into; None if it is open."""
        opener = self._openers.get(term[-1]) if term[0].lower() == "in" else None
        joint = self._scene.joint(term[-1]) if opener else None
        if opener is None or joint is None:
            return None
        if opener.busy:
            return opener
        if joint.position < WIDE_OPEN:
            self._opened.add(term[-1])
        elif joint.position > SHUT:
            self._opened.discard(term[-1])
        return None if term[-1] in self._opened else opener

    def _place(self, names: list[str]) -> float:
        """Where an object goes of those that share a region."""
        name, destination = names
        sharing = [term[1] for term, _ in self._terms if term[2:] == (destination,)]
        if len(sharing) == 1:
            return 0.0
        return 2.0 * sharing.index(name) / (len(sharing) - 1) - 1.0

    def _is_drawer(self, name: str) -> bool:
        joint = self._scene.joint(name)
        return joint is not None and joint.slides

    def _skill(self, term: tuple[str, ...]) -> Skill:
        scene, upright = self._scene, self._upright
        predicate, *names = term
        match predicate.lower():
            case "on" if scene.is_plate(names[0]) and scene.is_on_table(names[1]):
                return Slide(scene, upright, *names)
            case "on" | "in" as place:
                where = self._place(names) if place == "on" else 0.0
                return PickPlace(scene, upright, *names, inside=place == "in", place=where)
            case "turnon" | "turnoff" as way:
                return TurnKnob(scene, upright, *names, on=way == "turnon")
            case "open" if self._is_drawer(names[0]):
                return OpenDrawer(scene, upright, *names)
            case "close" if self._is_drawer(names[0]):
                return CloseDrawer(scene, upright, *names)
            case "open" | "close" as way:
                return PushDoor(scene, upright, *names, closes=way == "close")
            case _:
                raise EnvironmentNotReadyError(f"the expert cannot do ({' '.join(term)})")


def _rank(term: tuple[str, ...]) -> Any:
    return ORDER.index(term[0].lower())
