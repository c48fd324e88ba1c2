"""Control steps of LIBERO's robot in one compiled function that holds no interpreter lock.

Stock robosuite runs every physics substep through Python: two forward passes to read the robot,
the operational space controller, the simulation step. Here a substep is `mj_step1`, the torques and
`mj_step2`, which is what `mj_step` alone costs, and the numbers are the same to the last bit. For
that the order of operations and the memory layouts of matrices (they select routines of the linear
algebra library) are those of robosuite 1.4, whose own compiled functions are called where it has
some; and what stock remembers from one substep to the next is remembered here as well.

MuJoCo's functions are called by their addresses, so that numba can keep the machine code in its
cache on disk: compiling takes some 10 s, loading 0.1 s.

Formulas: Khatib, "A unified approach for motion and force control of robot manipulators" (1987);
robosuite 1.4, controllers/osc.py.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vlactl_libero import quiet

with quiet.imports():
    from robosuite.utils.control_utils import (
        nullspace_torques,
        opspace_matrices,
        orientation_error,
    )
    from robosuite.utils.transform_utils import quat2mat

SUBSTEPS = 25
"""Physics steps of 2 ms per control step."""
SAMPLED_SUBSTEPS = 24
"""Substeps after which robosuite reads its sensors: a clock of floats that lags by one decides it,
once an initial state has been set with its forced readings."""

NUM_JOINTS = 7


class Arm(NamedTuple):
    """Constants of the robot in a compiled model."""

    site: int
    """End effector."""
    joints: np.ndarray
    """int64 [7], addresses in qpos and in qvel alike."""
    actuators: np.ndarray
    """int64 [7]."""
    torque_low: np.ndarray
    torque_high: np.ndarray
    stiffness: np.ndarray
    """float64 [6], position then orientation; so are `damping` and `action_scale`."""
    damping: np.ndarray
    action_scale: np.ndarray
    rest: np.ndarray
    """float64 [7], joint positions that the null space is drawn to."""
    fingers: np.ndarray
    """int64 [2], actuators."""
    finger_bias: np.ndarray
    finger_gain: np.ndarray
    finger_speed: np.ndarray
    """float64 [2], change of command per substep while closing."""


class Memory(NamedTuple):
    """What the controllers remember: targets, and their last reading of the robot.

    Matrices are stored transposed, so that their transposes have the layout that stock's have.
    """

    goal_position: np.ndarray
    goal_rotation: np.ndarray
    finger_command: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    velocity: np.ndarray
    angular_velocity: np.ndarray
    joint_position: np.ndarray
    joint_velocity: np.ndarray
    jacobian_T: np.ndarray
    """float64 [7, 6]: translation, rotation."""
    mass_T: np.ndarray
    """float64 [7, 7]."""


class Simulation(NamedTuple):
    """Addresses of a model and its data, views into the data, and scratch space."""

    model: int
    data: int
    qpos: np.ndarray
    qvel: np.ndarray
    bias_force: np.ndarray
    inertia: np.ndarray
    site_position: np.ndarray
    site_rotation: np.ndarray
    control: np.ndarray
    jacobian: np.ndarray
    """float64 [2, 3, nv]."""
    mass: np.ndarray
    """float64 [nv, nv]."""


def bind(model: int, data: mujoco.MjData, nv: int) -> Simulation:
    """What `run` needs of a model (by address) and its data."""
    return Simulation(
        model=model,
        data=int(data._address),
        qpos=data.qpos,
        qvel=data.qvel,
        bias_force=data.qfrc_bias,
        inertia=data.qM,
        site_position=data.site_xpos,
        site_rotation=data.site_xmat,
        control=data.ctrl,
        jacobian=np.zeros((2, 3, nv)),
        mass=np.zeros((nv, nv)),
    )


def library() -> ctypes.CDLL:
    """MuJoCo's C library, the one that the Python package has loaded."""
    (path,) = Path(mujoco.__file__).parent.glob("libmujoco.so*")
    return ctypes.CDLL(str(path))


def addresses() -> np.ndarray:
    """Addresses of the C functions that `run` calls, int64, in the order of the names below."""
    names = ("mj_step1", "mj_step2", "mj_jacSite", "mj_fullM")
    loaded = library()
    pointers = [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names]
    return np.array(pointers, np.int64)


_STEP1, _STEP2, _SITE_JACOBIAN, _FULL_INERTIA = range(4)


@intrinsic
def _call(_context: Any, address: types.Type, arguments: types.Type) -> Any:
    """Call the C function at `address` with a tuple of integers and pointers; it returns nothing.

    A 32-bit integer is passed as `int`, a 64-bit one as a pointer.
    """

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        function = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(address, arguments), generate


@njit(nogil=True, cache=True, error_model="numpy")
def run(
    functions: np.ndarray,
    sim: Simulation,
    arm: Arm,
    memory: Memory,
    action: np.ndarray,
    num_substeps: int,
    starts: bool,
    reads: bool,
) -> None:
    """Run substeps of one control step.

    Args:
        functions: `addresses()`.
        sim: what is simulated.
        arm: the robot.
        memory: of the controllers; changed.
        action: float64 [7], in [-1, 1] or clipped to it: translation, rotation, gripper.
        num_substeps: how many to run.
        starts: the control step begins here, which sets the controllers' targets.
        reads: the robot is read in the first substep; if not, the last reading is used again.
    """
    for substep in range(num_substeps):
        _call(functions[_STEP1], (sim.model, sim.data))
        if reads or substep:
            _read(functions, sim, arm, memory)
        if starts and not substep:
            _set_goal(arm, memory, action)
        _actuate_arm(sim, arm, memory)
        _actuate_fingers(sim, arm, memory, action[6])
        _call(functions[_STEP2], (sim.model, sim.data))


@njit(nogil=True, cache=True, error_model="numpy")
def _read(functions: np.ndarray, sim: Simulation, arm: Arm, memory: Memory) -> None:
    translation, turning = sim.jacobian[0], sim.jacobian[1]
    memory.position[:] = sim.site_position[arm.site]
    memory.rotation[:] = sim.site_rotation[arm.site].reshape((3, 3))
    pointers = (translation.ctypes.data, turning.ctypes.data)
    arguments = (sim.model, sim.data, pointers[0], pointers[1], np.int32(arm.site))
    _call(functions[_SITE_JACOBIAN], arguments)
    memory.velocity[:] = np.dot(translation, sim.qvel)
    memory.angular_velocity[:] = np.dot(turning, sim.qvel)
    arguments = (sim.model, sim.mass.ctypes.data, sim.inertia.ctypes.data)
    _call(functions[_FULL_INERTIA], arguments)
    for i in range(NUM_JOINTS):
        joint = arm.joints[i]
        memory.joint_position[i] = sim.qpos[joint]
        memory.joint_velocity[i] = sim.qvel[joint]
        for axis in range(3):
            memory.jacobian_T[i, axis] = translation[axis, joint]
            memory.jacobian_T[i, 3 + axis] = turning[axis, joint]
        for j in range(NUM_JOINTS):
            memory.mass_T[j, i] = sim.mass[joint, arm.joints[j]]


@njit(nogil=True, cache=True, error_model="numpy")
def _set_goal(arm: Arm, memory: Memory, action: np.ndarray) -> None:
    delta = np.empty(6)
    for i in range(6):
        delta[i] = min(max(action[i], -1.0), 1.0) * arm.action_scale[i]
    turn = delta[3:]
    if turn[0] != 0.0 or turn[1] != 0.0 or turn[2] != 0.0:  # else the old target remains
        angle = math.sqrt(np.dot(turn, turn))
        quaternion = np.empty(4)
        quaternion[:3] = turn / angle * math.sin(angle / 2.0)
        quaternion[3] = math.cos(angle / 2.0)
        memory.goal_rotation[:] = np.dot(quat2mat(quaternion), memory.rotation)
    memory.goal_position[:] = memory.position + delta[:3]


@njit(nogil=True, cache=True, error_model="numpy")
def _actuate_arm(sim: Simulation, arm: Arm, memory: Memory) -> None:
    stiffness, damping = arm.stiffness, arm.damping
    position_error = memory.goal_position - memory.position
    rotation_error = orientation_error(memory.goal_rotation, memory.rotation)
    force = position_error * stiffness[:3] + (-memory.velocity) * damping[:3]
    torque = rotation_error * stiffness[3:] + (-memory.angular_velocity) * damping[3:]
    mass, jacobian = memory.mass_T.T, memory.jacobian_T.T
    _, position_inertia, rotation_inertia, nullspace = opspace_matrices(
        mass, jacobian, memory.jacobian_T[:, :3].copy().T, memory.jacobian_T[:, 3:].copy().T
    )
    wrench = np.empty(6)
    wrench[:3] = np.dot(position_inertia, force)
    wrench[3:] = np.dot(rotation_inertia, torque)
    torques = np.dot(memory.jacobian_T, wrench)
    for i in range(NUM_JOINTS):
        torques[i] += sim.bias_force[arm.joints[i]]
    torques += nullspace_torques(
        mass, nullspace, arm.rest, memory.joint_position, memory.joint_velocity
    )
    for i in range(NUM_JOINTS):
        limited = min(max(torques[i], arm.torque_low[i]), arm.torque_high[i])
        sim.control[arm.actuators[i]] = limited


@njit(nogil=True, cache=True, error_model="numpy")
def _actuate_fingers(sim: Simulation, arm: Arm, memory: Memory, closing: float) -> None:
    for i in range(2):
        command = memory.finger_command[i] + arm.finger_speed[i] * np.sign(closing)
        command = min(max(command, -1.0), 1.0)
        memory.finger_command[i] = command
        sim.control[arm.fingers[i]] = arm.finger_bias[i] + arm.finger_gain[i] * command
