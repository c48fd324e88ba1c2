"""Actions that move the hand to a pose: what LIBERO's OSC_POSE controller takes.

An action is a displacement of the target pose, 5 cm or half a radian per unit, in the world's
frame, and the gripper's command.
"""

from __future__ import annotations

import numpy as np

from vlactl_libero.expert.geometry import rotation_vector
from vlactl_libero.expert.scene import Hand

OPEN, CLOSE = -1.0, 1.0

METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
GAIN = 1.6
TURN_GAIN = 1.2
MAX_TURN = 0.6
YAW_DEADBAND = 0.04
TILT_DEADBAND = 0.5
"""In units of an action: a hand that points down is not corrected. The controller decouples force
from torque, and close to the arm's full reach turning the hand costs it a centimetre of height."""


def reach(
    hand: Hand,
    position: np.ndarray,
    rotation: np.ndarray,
    grip: float,
    *,
    speed: float = 1.0,
    tilt_deadband: float = TILT_DEADBAND,
) -> np.ndarray:
    """The action [7] that brings the hand closer to a pose.

    Args:
        hand: where it is.
        position: [3], where its grip site is to be.
        rotation: [3, 3], of that site.
        grip: `OPEN` or `CLOSE`.
        speed: limit of each component of the translation, in units of an action.
        tilt_deadband: rotations about horizontal axes below it, in units of an action, are left.
    """
    move = GAIN / METRES_PER_UNIT * (position - hand.position)
    largest = np.abs(move).max()
    if largest > speed:
        move *= speed / largest
    turn = TURN_GAIN / RADIANS_PER_UNIT * rotation_vector(rotation @ hand.rotation.T)
    deadband = np.array([tilt_deadband, tilt_deadband, min(YAW_DEADBAND, tilt_deadband)])
    turn = np.where(np.abs(turn) < deadband, 0.0, np.clip(turn, -MAX_TURN, MAX_TURN))
    return np.concatenate([move, turn, [grip]])
