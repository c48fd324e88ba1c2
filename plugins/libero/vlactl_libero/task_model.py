"""A task compiled once, for any number of simulators in this process.

Stock LIBERO builds the scene; afterwards only its compiled model, the constants of its robot and
what it draws fixture poses with are used. Two things that differ between simulators live in the
model: the poses of fixtures, hence `PosedModel`, and the alpha values of sites (a stove's glow),
which are set while a picture is captured.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero import quiet
from vlactl_libero.control import NUM_JOINTS, Arm, Memory
from vlactl_libero.placement import place, with_arm_noise
from vlactl_libero.tasks import name_of_interest

with quiet.imports():
    from libero.libero.envs.env_wrapper import ControlEnv

_UNPLACED = ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0))
_LIBC = ctypes.CDLL(None)
_LIBC.malloc_usable_size.argtypes = [ctypes.c_void_p]
_LIBC.malloc_usable_size.restype = ctypes.c_size_t


class TaskModel:
    """A compiled task.

    Args:
        bddl_file: the task's definition.

    Attributes:
        model: MuJoCo's model, shared by all simulators of the task.
        domain: stock's environment, for goals and for drawing poses; never stepped.
        arm: constants of the robot.
        finger_joints: addresses in qpos.
        hand: body whose orientation is the end effector's.
        fixtures: bodies whose poses are drawn.
        site_alphas: float32 [nsite], of all sites after a reset; pictures change the model's.
    """

    def __init__(self, bddl_file: Path) -> None:
        self.domain = place(0, lambda _: _build(bddl_file))
        self.model: mujoco.MjModel = self.domain.sim.model._model
        self.site_alphas = self.model.site_rgba[:, 3].copy()
        # Force sensors in the wrist cost a pass over all bodies and nothing reads them.
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        robot = self.domain.robots[0]
        self.arm = _arm(robot)
        self.finger_joints = np.array(robot._ref_gripper_joint_pos_indexes)
        self.hand = int(self.domain.sim.model.body_name2id(robot.robot_model.eef_name))
        self.fixtures = np.array(
            [self.domain.obj_body_id[name] for name in self.domain.fixtures_dict], np.int64
        )
        self._fresh = _memory(robot)

    def fresh_memory(self) -> Memory:
        """What the controllers remember after stock's reset, before an initial state is set."""
        return Memory(*(array.copy() for array in self._fresh))

    def draw_fixtures(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions [F, 3] and quaternions [F, 4] of `fixtures`, as stock draws them.

        They are those of a new stock environment after `seed(seed % 2**32)` and `reset()`.
        """
        placements = place(seed, lambda attempt: _draw_placements(self.domain, attempt))
        poses = [placements.get(name, _UNPLACED) for name in self.domain.fixtures_dict]
        positions = np.array([pose[0] for pose in poses], np.float64).reshape(-1, 3)
        quaternions = np.array([pose[1] for pose in poses], np.float64).reshape(-1, 4)
        return positions, quaternions

    def draw_state(self, seed: int) -> np.ndarray:
        """An initial state from the task's own sampler, float64 [1 + nq + nv].

        It is that of a new stock environment after `seed(seed % 2**32)` and `reset()`, with noise
        on the arm. Objects stand where `draw_fixtures` puts the fixtures for the same seed.
        """
        return with_arm_noise(place(seed, self._draw_state), self.arm.joints, seed)

    def _draw_state(self, attempt: int) -> np.ndarray:
        domain, robot, data = self.domain, self.domain.robots[0], self.domain.sim.data
        placements = _draw_placements(domain, attempt)
        data.qpos[self.arm.joints] = robot.init_qpos
        data.qpos[self.finger_joints] = robot.gripper.init_qpos
        for position, quaternion, placed in placements.values():
            if placed.name not in domain.fixtures_dict:
                data.set_joint_qpos(placed.joints[-1], np.concatenate([position, quaternion]))
        state: np.ndarray = domain.sim.get_state().flatten()
        return state

    def point_of_interest(self, data: mujoco.MjData) -> np.ndarray:
        """Position [3], a view, of what the task is about in the first place."""
        name = name_of_interest(self.domain.parsed_problem)
        body = self.domain.obj_body_id.get(name)
        if body is not None:
            position: np.ndarray = data.xpos[body]
            return position
        position = data.site_xpos[self.domain.sim.model.site_name2id(name)]
        return position


class PosedModel:
    """A model with body poses of its own; everything else is another model's memory.

    Only the C struct is copied, some kilobytes of sizes, options and pointers, and the pointers to
    the poses are replaced. MuJoCo's C functions take its `address` like that of any model.

    Attributes:
        address: of the struct.
        body_pos: float64 [nbody, 3], private.
        body_quat: float64 [nbody, 4], private.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        self._model = model  # keeps the shared memory alive
        self.body_pos, self.body_quat = model.body_pos.copy(), model.body_quat.copy()
        size = _LIBC.malloc_usable_size(model._address) // 8 * 8
        self._struct = ctypes.create_string_buffer(size)
        ctypes.memmove(self._struct, model._address, size)
        words = np.frombuffer(self._struct, np.uint64)
        for shared, own in ((model.body_pos, self.body_pos), (model.body_quat, self.body_quat)):
            (places,) = np.nonzero(words == shared.ctypes.data)
            if len(places) != 1:
                raise EnvironmentNotReadyError(
                    f"MuJoCo {mujoco.__version__} lays out its models in an unknown way",
                    hint='env.backend = "stock"',
                )
            words[places[0]] = own.ctypes.data
        self.address = ctypes.addressof(self._struct)


def _build(bddl_file: Path) -> Any:
    """Stock's environment as a reset leaves it, but with fixtures where their files have them."""
    domain = ControlEnv(
        bddl_file_name=str(bddl_file),
        use_camera_obs=False,
        has_offscreen_renderer=False,
        hard_reset=False,
        ignore_done=True,
    ).env
    model = domain.sim.model
    for name in domain.fixtures_dict:
        body = domain.obj_body_id[name]
        model.body_pos[body], model.body_quat[body] = _UNPLACED
    domain.visualize(dict.fromkeys(domain._visualizations, False))
    return domain


def _draw_placements(domain: Any, attempt: int) -> dict[str, tuple[Any, ...]]:
    """What a rebuild draws, in its order: object or fixture -> (position, quaternion, model)."""
    np.random.randn(len(domain.robots[0].init_qpos))  # noise of the arm, of magnitude 0
    domain.sim.reset()
    # A rebuild appends its samplers of joints to those that the constructor has appended.
    for sampler in domain.object_property_initializers * (2 + attempt):
        domain.object_states_dict[sampler.name].set_joint(sampler.sample())
    mujoco.mj_kinematics(domain.sim.model._model, domain.sim.data._data)
    placements = domain.placement_initializer.sample()
    placements = domain.conditional_placement_initializer.sample(domain.sim, placements)
    placed: dict[str, tuple[Any, ...]] = domain.conditional_placement_on_objects_initializer.sample(
        placements
    )
    return placed


def _arm(robot: Any) -> Arm:
    """The robot's constants, from stock's controllers."""
    controller, gripper, model = robot.controller, robot.gripper, robot.sim.model
    _check_controller(controller)
    fingers = np.array([model.actuator_name2id(name) for name in gripper.actuators], np.int64)
    low, high = model.actuator_ctrlrange[fingers].T
    torque_low, torque_high = robot.torque_limits
    span = abs(controller.output_max - controller.output_min)
    return Arm(
        site=int(model.site_name2id(controller.eef_name)),
        joints=np.array(controller.qpos_index, np.int64),
        actuators=np.array(robot._ref_joint_actuator_indexes, np.int64),
        torque_low=np.array(torque_low),
        torque_high=np.array(torque_high),
        stiffness=np.array(controller.kp, np.float64),
        damping=np.array(controller.kd, np.float64),
        action_scale=span / abs(controller.input_max - controller.input_min),
        rest=np.array(controller.initial_joint),
        fingers=fingers,
        finger_bias=0.5 * (high + low),
        finger_gain=0.5 * (high - low),
        finger_speed=np.array([-1.0, 1.0]) * gripper.speed,
    )


def _check_controller(controller: Any) -> None:
    """Refuse settings that the compiled controller does not have; LIBERO has none of them."""
    plain = (
        len(controller.qpos_index) == NUM_JOINTS
        and list(controller.qpos_index) == list(controller.qvel_index)
        and controller.impedance_mode == "fixed"
        and controller.use_delta
        and controller.use_ori
        and controller.uncoupling
        and controller.interpolator_pos is None
        and controller.interpolator_ori is None
        and controller.position_limits is None
        and controller.orientation_limits is None
        and (controller.input_max == -controller.input_min).all()
        and (controller.output_max == -controller.output_min).all()
    )
    if not plain:
        raise EnvironmentNotReadyError(
            "this task's robot has a controller that the fast core does not know",
            hint='env.backend = "stock"',
        )


def _memory(robot: Any) -> Memory:
    """What stock's controllers remember now."""
    controller = robot.controller
    return Memory(
        goal_position=np.array(controller.goal_pos),
        goal_rotation=np.array(controller.goal_ori),
        finger_command=np.zeros(2),
        position=np.array(controller.ee_pos),
        rotation=np.array(controller.ee_ori_mat),
        velocity=np.array(controller.ee_pos_vel),
        angular_velocity=np.array(controller.ee_ori_vel),
        joint_position=np.array(controller.joint_pos),
        joint_velocity=np.array(controller.joint_vel),
        jacobian_T=np.ascontiguousarray(controller.J_full.T),
        mass_T=np.ascontiguousarray(controller.mass_matrix.T),
    )
