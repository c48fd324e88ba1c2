"""The fast core: one simulator of a task, bit for bit stock LIBERO.

Stock rebuilds everything at every reset, which takes seconds. `FastStage.restore` leaves what a
rebuild followed by `set_init_state` leaves. Apart from MuJoCo's state that takes:
* what the arm's controller has read of the robot before the initial state was set: the first
  torque of an episode is computed from it, and its target orientation stays until an action turns;
* the gripper's integrated command;
* the substep at which the sensors are read;
* the poses of fixtures, which stock draws at every rebuild and which no initial state contains.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import mujoco
import numpy as np

from vlactl_libero import quiet
from vlactl_libero.control import SAMPLED_SUBSTEPS, SUBSTEPS, addresses, bind, library, run
from vlactl_libero.expert.expert import Expert
from vlactl_libero.goals import Glow, Goal
from vlactl_libero.pictures import View
from vlactl_libero.task_model import PosedModel, TaskModel
from vlactl_libero.tasks import STATE_DIM

with quiet.imports():
    from robosuite.utils.transform_utils import convert_quat, quat2axisangle

mujoco.set_mju_user_warning(quiet.warn)
quiet.on_fatal_error(library())

_FUNCTIONS = addresses()
_MUJOCO = library()
for _function in (_MUJOCO.mj_resetData, _MUJOCO.mj_forward):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    _function.restype = None


class FastStage:
    """A task's simulation.

    Args:
        task: shared with other simulators of this process.
        view: draws pictures of this simulator; None where no camera is used.
        on_close: called when the stage is left.

    Attributes:
        state: float32 [8], end effector position, axis-angle and finger joints, last sampled.
    """

    def __init__(self, task: TaskModel, view: View | None, on_close: Callable[[], None]) -> None:
        self._task, self._view, self._on_close = task, view, on_close
        self._data = mujoco.MjData(task.model)
        self._posed = PosedModel(task.model)
        self._simulation = bind(self._posed.address, self._data, task.model.nv)
        self._memory = task.fresh_memory()
        self._is_fresh = True
        self._goal = Goal(task.domain, self._data)
        self._glow = Glow(task.domain, self._data, task.site_alphas)
        self._gripper = self._data.site_xpos[task.arm.site]
        self._interest = task.point_of_interest(self._data)
        self.state = np.zeros(STATE_DIM, np.float32)
        self._pictures: dict[str, np.ndarray] = {}
        self._is_drawn = True

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """Camera -> uint8 [H, W, 3], upright, last sampled; drawn when somebody looks."""
        if self._view is not None and not self._is_drawn:
            self._pictures = self._view.draw()
            self._is_drawn = True
        return self._pictures

    @property
    def state_length(self) -> int:
        """Numbers in an initial state of this task: 1 + nq + nv."""
        return int(1 + self._task.model.nq + self._task.model.nv)

    def draw_state(self, seed: int) -> np.ndarray:
        """An initial state from the task's own sampler, float64 [1 + nq + nv]."""
        return self._task.draw_state(seed)

    def restore(
        self, init_state: np.ndarray, fixture_seed: int, cameras: Sequence[str] | None = None
    ) -> None:
        """Start from an initial state; sample the state and `cameras` unless None."""
        self._place_fixtures(fixture_seed)
        self._set_state(init_state)
        for remembered, fresh in zip(self._memory, self._task.fresh_memory(), strict=True):
            remembered[:] = fresh
        self._is_fresh = True
        self._glow.reset()
        self._glow.update()
        if cameras is not None:
            self._sample(cameras)

    def step(self, action: np.ndarray, cameras: Sequence[str] | None = None) -> bool:
        """Run one control step; sample the state and `cameras` unless None.

        Returns:
            Whether the task is solved after the step.
        """
        action = np.ascontiguousarray(action, np.float64)
        if cameras is None:
            self._run(action, SUBSTEPS, starts=True)
        else:
            self._run(action, SAMPLED_SUBSTEPS, starts=True)
            self._sample(cameras)
            self._run(action, SUBSTEPS - SAMPLED_SUBSTEPS, starts=False)
        self._glow.update()
        return self._goal.reached()

    def reach(self) -> float:
        """Metres between the gripper and what the task is about in the first place."""
        return float(np.linalg.norm(self._interest - self._gripper))

    def expert(self) -> Expert:
        """A scripted player of this simulator, which reads more than any policy may."""
        return Expert(self._task, self._data)

    def close(self) -> None:
        """Leave the task; nothing else may be called afterwards."""
        self._on_close()

    def _place_fixtures(self, seed: int) -> None:
        bodies = self._task.fixtures
        positions, quaternions = self._task.draw_fixtures(seed)
        self._posed.body_pos[bodies] = positions
        self._posed.body_quat[bodies] = quaternions

    def _set_state(self, init_state: np.ndarray) -> None:
        data, nq = self._data, self._task.model.nq
        model_and_data = (self._simulation.model, self._simulation.data)
        _MUJOCO.mj_resetData(*model_and_data)
        data.time = init_state[0]
        data.qpos[:] = init_state[1 : 1 + nq]
        data.qvel[:] = init_state[1 + nq :]
        _MUJOCO.mj_forward(*model_and_data)

    def _run(self, action: np.ndarray, num_substeps: int, *, starts: bool) -> None:
        reads = not self._is_fresh
        run(
            _FUNCTIONS,
            self._simulation,
            self._task.arm,
            self._memory,
            action,
            num_substeps,
            starts,
            reads,
        )
        self._is_fresh = False

    def _sample(self, cameras: Sequence[str]) -> None:
        data, task = self._data, self._task
        quaternion = convert_quat(data.xquat[task.hand].copy(), to="xyzw")
        fingers = data.qpos[task.finger_joints]
        self.state = np.concatenate(
            [self._gripper, quat2axisangle(quaternion), fingers], dtype=np.float32
        )
        if self._view is not None and cameras:
            self._view.capture(data, cameras, self._glow.sites, self._glow.alphas)
            self._is_drawn = False
