"""What a task's data mean on any simulator of the task: is it solved, does its stove glow.

Goals of LIBERO are conjunctions of predicates on objects and sites. Contacts are looked up in
tables of geoms; what stock computes from positions and joints alone is stock's own function,
applied to this simulator's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mujoco
import numpy as np

from vlactl.errors import EnvironmentNotReadyError

Condition = Callable[[], bool]
MAX_OFFSET = 0.03
"""Metres between the axes of an object and of what it stands on."""
_JOINT_TESTS = {
    "open": ("is_open", any),
    "close": ("is_close", all),
    "turnon": ("turn_on", any),
    "turnoff": ("turn_off", all),
}
"""Predicate -> stock's test of a joint position, and of how many joints it must hold."""


class Goal:
    """The goal of a task on one simulator's data.

    Args:
        domain: stock's environment of the task.
        data: of the simulator.

    Attributes:
        terms: predicate and names as the task's file has them, and whether that holds now.

    Raises:
        EnvironmentNotReadyError: the goal has a predicate that the fast core does not know.
    """

    def __init__(self, domain: Any, data: mujoco.MjData) -> None:
        self._domain, self._data = domain, data
        goal = domain.parsed_problem["goal_state"]
        self.terms = [(tuple(term), self._condition(*term)) for term in goal]

    def reached(self) -> bool:
        """Every predicate holds."""
        return all(holds() for _, holds in self.terms)

    def _condition(self, predicate: str, *names: str) -> Condition:
        sites = self._domain.object_sites_dict
        match (predicate.lower(), *(name in sites for name in names)):
            case ("on", False, False):
                return self._on_object(*names)
            case ("on", False, True):
                return self._on_site(*names)
            case ("in", False, True):
                return self._in_site(*names)
            case (test, _) if test in _JOINT_TESTS:
                return joint_test(self._domain, self._data, test, names[0])
            case _:
                raise EnvironmentNotReadyError(
                    f"the fast core does not know the goal ({predicate} {' '.join(names)})",
                    hint='env.backend = "stock"',
                )

    def _on_object(self, upper: str, lower: str) -> Condition:
        top, bottom = self._position(upper), self._position(lower)
        touching = self._touching(lower, upper)

        def holds() -> bool:
            offset = np.linalg.norm(bottom[:2] - top[:2])
            return bool(bottom[2] <= top[2] and offset < MAX_OFFSET and touching())

        return holds

    def _on_site(self, name: str, site_name: str) -> Condition:
        site = self._domain.object_sites_dict[site_name]
        position, pose = self._position(name), self._site_pose(site_name)
        if self._domain.get_object(site.parent_name) is None:  # a region of the table or floor
            return lambda: bool(site.under(*pose, position))
        touching = self._touching(site.parent_name, name)
        return lambda: bool(site.under(*pose, position)) and touching()

    def _in_site(self, name: str, site_name: str) -> Condition:
        site = self._domain.object_sites_dict[site_name]
        position, pose = self._position(name), self._site_pose(site_name)
        return lambda: bool(site.in_box(*pose, position))

    def _position(self, name: str) -> np.ndarray:
        position: np.ndarray = self._data.xpos[self._domain.obj_body_id[name]]
        return position

    def _site_pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        site = self._domain.sim.model.site_name2id(name)
        return self._data.site_xpos[site], self._data.site_xmat[site].reshape(3, 3)

    def _touching(self, first: str, second: str) -> Condition:
        is_first, is_second = self._geom_table(first), self._geom_table(second)
        data = self._data  # not `self`, which holds this function: a cycle would outlive the stage

        def holds() -> bool:
            geoms = data.contact.geom
            ones, others = geoms[:, 0], geoms[:, 1]
            forth = is_first[ones] & is_second[others]
            back = is_second[ones] & is_first[others]
            return bool((forth | back).any())

        return holds

    def _geom_table(self, name: str) -> np.ndarray:
        """Which geoms belong to an object, bool [ngeom]."""
        model = self._domain.sim.model
        table = np.zeros(model.ngeom, bool)
        geoms = self._domain.get_object(name).contact_geoms
        table[[model.geom_name2id(geom) for geom in geoms]] = True
        return table


class Glow:
    """The sites that stock shows while something is turned on, on one simulator's data.

    Args:
        domain: stock's environment of the task.
        data: of the simulator.
        site_alphas: float32 [nsite], as compiled.

    Attributes:
        sites: int64 [S].
        alphas: float32 [S], as `update` has left them.
    """

    def __init__(self, domain: Any, data: mujoco.MjData, site_alphas: np.ndarray) -> None:
        shown = list(_shown_sites(domain, data))
        model = domain.sim.model
        self.sites = np.array([model.site_name2id(name) for name, _ in shown], np.int64)
        self._tests = [test for _, test in shown]
        self._initial = site_alphas[self.sites]
        self.alphas = self._initial.copy()

    def reset(self) -> None:
        """As after a rebuild."""
        self.alphas[:] = self._initial

    def update(self) -> None:
        """What stock does at the end of every control step."""
        for index, is_on in enumerate(self._tests):
            if is_on() != (self.alphas[index] > 0):
                self.alphas[index] = 1 - self.alphas[index]


def joint_test(domain: Any, data: mujoco.MjData, predicate: str, name: str) -> Condition:
    """A predicate on the joints of an object, or of a site's part of its parent."""
    site = domain.object_sites_dict.get(name)
    owner = domain.get_object(site.parent_name if site else name)
    method, combine = _JOINT_TESTS[predicate]
    test = getattr(owner, method)
    joints = site.joints if site else owner.joints
    addresses = [domain.sim.model.get_joint_qpos_addr(joint) for joint in joints]
    qpos = data.qpos
    return lambda: combine(test(qpos[address]) for address in addresses)


def _shown_sites(domain: Any, data: mujoco.MjData) -> Iterator[tuple[str, Condition]]:
    for name in domain.visualization_sites_list:
        is_on = joint_test(domain, data, "turnon", name)
        for site, _ in domain.get_object(name).object_properties["vis_site_names"].values():
            yield site, is_on
