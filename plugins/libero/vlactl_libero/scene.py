"""One LIBERO task in the stock simulator, compiled once and restored for every episode.

Stock LIBERO rebuilds everything at every reset, which takes seconds. `Scene.restore` leaves, bit
for bit, what a rebuild followed by `set_init_state` leaves. Apart from MuJoCo's state that takes:
* the arm controller's last reading of the robot, from before the initial state was set: the first
  torque of an episode is computed from it, and its target orientation stays until an action turns;
* the gripper's integrated command;
* the clock that decides at which of a control step's 25 substeps the sensors are read;
* the poses of fixtures, which stock draws at every rebuild and which are not part of an initial
  state: here they are drawn once, from a seed.
The visibility of sites (the stove's glow) follows from the state by itself.

Importing this module imports the simulator: only simulator processes do.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mujoco
import numpy as np

from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero import quiet
from vlactl_libero.tasks import CONTROL_HZ, STATE_DIM

with quiet.imports():
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.utils.binding_utils import MjRenderContextOffscreen
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.observables import Observable, sensor
    from robosuite.utils.transform_utils import quat2axisangle

mujoco.set_mju_user_warning(quiet.warn)

CAMERA_NAMES = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
MAX_PLACEMENTS = 100
"""Attempts to place objects without overlap; one or two are usual."""

_STATE_SENSORS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_Result = TypeVar("_Result")


class Scene:
    """A task's simulation.

    Args:
        bddl_file: the task's definition.
        image_size: height and width of pictures.
        fixture_seed: of the poses of fixtures.

    Attributes:
        state: float32 [8], end effector position, axis-angle and finger joints, last sampled.
        pictures: camera -> uint8 [H, W, 3], upright, last sampled.
    """

    def __init__(self, bddl_file: Path, image_size: int, fixture_seed: int) -> None:
        with quiet.stdout():
            self._wrapper = _build(bddl_file, fixture_seed)
        self._domain = self._wrapper.env
        self._sim = self._domain.sim
        self._size = image_size
        self._renderer = _make_renderer(self._sim, image_size)
        self._state_sensors = [self._domain._observables[name]._sensor for name in _STATE_SENSORS]
        self._wanted: Sequence[str] | None = None
        self._sampler = self._install_sampler()
        self._fresh = _Fresh(self._domain.robots[0])
        self.state = np.zeros(STATE_DIM, np.float32)
        self.pictures: dict[str, np.ndarray] = {}

    @property
    def state_length(self) -> int:
        """Numbers in an initial state of this task: 1 + nq + nv."""
        return int(1 + self._sim.model.nq + self._sim.model.nv)

    def restore(self, init_state: np.ndarray, cameras: Sequence[str] | None = None) -> None:
        """Start from an initial state; sample the state and `cameras` unless None."""
        self._sim.reset()
        self._fresh.restore()
        self._wanted = None
        self._sampler.reset()
        self._domain._update_observables(force=True)  # as a rebuild does before set_init_state
        self._wanted = cameras
        self._wrapper.set_init_state(init_state)

    def step(self, action: np.ndarray, cameras: Sequence[str] | None = None) -> bool:
        """Run one control step; sample the state and `cameras` unless None.

        Returns:
            Whether the task is solved after the step.
        """
        self._wanted = cameras
        _, _, solved, _ = self._wrapper.step(action)
        return bool(solved)

    def reach(self) -> float:
        """Metres between the gripper and what the task is about in the first place."""
        name = self._domain.obj_of_interest[0]
        data = self._sim.data
        body = self._domain.obj_body_id.get(name)
        target = data.get_site_xpos(name) if body is None else data.body_xpos[body]
        gripper = data.site_xpos[self._domain.robots[0].eef_site_id]
        return float(np.linalg.norm(target - gripper))

    def close(self) -> None:
        """Free the simulation and its GL context; nothing else may be called afterwards."""
        del self._renderer, self._state_sensors, self._sampler, self._fresh, self._sim
        self._wrapper.close()
        del self._domain, self._wrapper
        gc.collect()

    def _install_sampler(self) -> Observable:
        """Put one sensor that costs nothing unless asked in the place of stock's 29.

        It keeps their clock, so it is read at the same substep as they would be.
        """

        def sample(_: dict[str, Any]) -> float:
            if self._wanted is not None:
                self.state = self._read_state()
                self.pictures = {camera: self._render(camera) for camera in self._wanted}
            return 0.0

        sampler = Observable("vlactl", sensor("vlactl")(sample), sampling_rate=CONTROL_HZ)
        self._domain._observables = OrderedDict(vlactl=sampler)
        return sampler

    def _read_state(self) -> np.ndarray:
        position, quaternion, fingers = (read({}) for read in self._state_sensors)
        return np.concatenate([position, quat2axisangle(quaternion), fingers], dtype=np.float32)

    def _render(self, camera: str) -> np.ndarray:
        pixels = self._sim.render(self._size, self._size, camera_name=CAMERA_NAMES[camera])
        return np.ascontiguousarray(pixels[::-1, ::-1])


class _Fresh:
    """What a rebuilt robot holds outside of MuJoCo's data, kept to be put back."""

    def __init__(self, robot: Any) -> None:
        self._robot = robot
        controller = {k: v for k, v in vars(robot.controller).items() if k != "sim"}
        self._controller = copy.deepcopy(controller)
        self._gripper_command = robot.gripper.current_action.copy()

    def restore(self) -> None:
        """Put everything back."""
        vars(self._robot.controller).update(copy.deepcopy(self._controller))
        self._robot.gripper.current_action = self._gripper_command.copy()


def _build(bddl_file: Path, fixture_seed: int) -> ControlEnv:
    """A domain as stock leaves it after `seed(fixture_seed)` and a reset."""
    np.random.seed(fixture_seed)  # stock draws from numpy's global generator
    wrapper = _place(
        lambda: ControlEnv(
            bddl_file_name=str(bddl_file),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,
            ignore_done=True,
        )
    )
    # A rebuild appends these samplers once more, and each draws: without the doubles the poses that
    # follow from a seed would not be those of stock.
    wrapper.env.object_property_initializers *= 2
    np.random.seed(fixture_seed)
    _place(wrapper.env.reset)
    return wrapper


def _place(attempt: Callable[[], _Result]) -> _Result:
    """Repeat what draws poses until no two objects overlap, as stock does without a limit."""
    for _ in range(MAX_PLACEMENTS):
        try:
            return attempt()
        except RandomizationError:
            continue
    raise EnvironmentNotReadyError(
        f"no placement of the objects without overlap in {MAX_PLACEMENTS} attempts",
        hint="try another env.fixture_seed",
    )


def _make_renderer(sim: Any, size: int) -> MjRenderContextOffscreen:
    """A GL context with a buffer of exactly the pictures' size: the same pixels, sooner."""
    sim.model.vis.global_.offwidth = sim.model.vis.global_.offheight = size
    renderer = MjRenderContextOffscreen(sim, device_id=-1, max_width=size, max_height=size)
    renderer.vopt.geomgroup[0] = 0  # collision shapes
    renderer.vopt.geomgroup[1] = 1  # visible ones
    return renderer
