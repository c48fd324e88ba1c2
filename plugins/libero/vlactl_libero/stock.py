"""One LIBERO task in the unmodified LIBERO environment: what the fast core is measured against.

Every episode rebuilds the scene, every control step reads all of robosuite's sensors and renders
all cameras: seconds per reset, and most of the time spent on pictures that nobody looks at.

LIBERO appends the samplers of drawers and stoves again whenever it rebuilds a scene, and each of
them draws: poses would depend on how many episodes a simulator has played. `_rebuild` forgets the
doubles first, so that it leaves what `seed` and `reset` leave in a new environment.

Importing this module imports the simulator: only simulator processes do.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import mujoco
import numpy as np

from vlactl_libero import quiet
from vlactl_libero.placement import place, with_arm_noise
from vlactl_libero.tasks import CAMERA_NAMES, STATE_DIM, name_of_interest

with quiet.imports():
    from libero.libero.envs.env_wrapper import ControlEnv, OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

mujoco.set_mju_user_warning(quiet.warn)


class StockStage:
    """A task's simulation.

    Args:
        bddl_file: the task's definition.
        image_size: height and width of pictures.
        cameras: those that every control step renders; without any there is no renderer.

    Attributes:
        state: float32 [8], end effector position, axis-angle and finger joints, last sampled.
        pictures: camera -> uint8 [H, W, 3], upright, last sampled.
    """

    def __init__(self, bddl_file: Path, image_size: int, cameras: Sequence[str]) -> None:
        self._env = place(0, lambda _: build(bddl_file, image_size, cameras))
        self._num_initializers = len(self._env.env.object_property_initializers)
        self.state = np.zeros(STATE_DIM, np.float32)
        self.pictures: dict[str, np.ndarray] = {}

    @property
    def state_length(self) -> int:
        """Numbers in an initial state of this task: 1 + nq + nv."""
        return len(self._env.get_sim_state())

    def draw_state(self, seed: int) -> np.ndarray:
        """An initial state from the task's own sampler, float64 [1 + nq + nv]."""
        self._rebuild(seed)
        joints = np.array(self._env.robots[0]._ref_joint_pos_indexes)
        return with_arm_noise(self._env.get_sim_state(), joints, seed)

    def restore(
        self, init_state: np.ndarray, fixture_seed: int, cameras: Sequence[str] | None = None
    ) -> None:
        """Rebuild the scene, start from an initial state; keep state and `cameras` unless None."""
        self._rebuild(fixture_seed)
        self._keep(self._env.set_init_state(init_state), cameras)

    def step(self, action: np.ndarray, cameras: Sequence[str] | None = None) -> bool:
        """Run one control step; keep the state and `cameras` unless None.

        Returns:
            Whether the task is solved after the step.
        """
        observation, _, solved, _ = self._env.step(action)
        self._keep(observation, cameras)
        return bool(solved)

    def reach(self) -> float:
        """Metres between the gripper and what the task is about in the first place."""
        domain = self._env.env
        name, data = name_of_interest(domain.parsed_problem), domain.sim.data
        body = domain.obj_body_id.get(name)
        target = data.get_site_xpos(name) if body is None else data.body_xpos[body]
        gripper = data.site_xpos[domain.robots[0].eef_site_id]
        return float(np.linalg.norm(target - gripper))

    def close(self) -> None:
        """Free the simulation and its GL context; nothing else may be called afterwards."""
        self._env.close()
        del self._env
        gc.collect()

    def _rebuild(self, seed: int) -> None:
        domain = self._env.env
        del domain.object_property_initializers[self._num_initializers :]
        place(seed, lambda _: domain.reset())

    def _keep(self, observation: Mapping[str, np.ndarray], cameras: Sequence[str] | None) -> None:
        if cameras is None:
            return
        self.state = state_of(observation)
        self.pictures = {camera: picture_of(observation, camera) for camera in cameras}


def build(bddl_file: Path, image_size: int, cameras: Sequence[str]) -> ControlEnv:
    """LIBERO's unmodified environment; it has no horizon of its own."""
    if not cameras:
        return ControlEnv(
            bddl_file_name=str(bddl_file),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            ignore_done=True,
        )
    return OffScreenRenderEnv(
        bddl_file_name=str(bddl_file),
        camera_names=[CAMERA_NAMES[camera] for camera in cameras],
        camera_heights=image_size,
        camera_widths=image_size,
        ignore_done=True,
    )


def state_of(observation: Mapping[str, np.ndarray]) -> np.ndarray:
    """End effector position, axis-angle and finger joints of stock's observation, float32 [8]."""
    quaternion = observation["robot0_eef_quat"].copy()  # its conversion writes into it
    return np.concatenate(
        [
            observation["robot0_eef_pos"],
            quat2axisangle(quaternion),
            observation["robot0_gripper_qpos"],
        ],
        dtype=np.float32,
    )


def picture_of(observation: Mapping[str, np.ndarray], camera: str) -> np.ndarray:
    """A camera's picture in stock's observation, turned by 180 degrees, uint8 [H, W, 3]."""
    return np.ascontiguousarray(observation[f"{CAMERA_NAMES[camera]}_image"][::-1, ::-1])
