"""Estimates of memory: what training holds on each device, and what a step holds on the host.

Counted on the device: weights, gradients and the two AdamW moments of what is trained, all in
`train.dtype`, and the activations of one micro-batch as the model plugin states them. Not counted:
float32 master weights (the optimizer works in `train.dtype`), recomputation, allocator slack.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlactl.api.contracts import EnvSpec
from vlactl.api.plugins import Footprint
from vlactl.config.run import RunConfig
from vlactl.launch.hardware import GIB

_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device while the policy is updated."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self, capacity: int) -> str:
        """One line, in the unit that fits the total."""
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
        )
        terms = " + ".join(f"{label} {size / unit:.1f}" for label, size in parts)
        return f"{terms} = {self.total / unit:.1f} {name} of {capacity / GIB:.1f} GiB per rank"


def device_memory(config: RunConfig, footprint: Footprint) -> DeviceMemory:
    """What the update needs on a device that holds the whole model."""
    trained = footprint.trainable * _BYTES[config.train.dtype]
    return DeviceMemory(
        weights=round(footprint.parameters * footprint.bytes_per_parameter),
        gradients=trained,
        optimizer=_ADAM_MOMENTS * trained,
        activations=footprint.activation_bytes * config.optim.micro_batch_size,
    )


def picture_bytes(config: RunConfig, spec: EnvSpec) -> int:
    """The pictures (uint8 RGB) of one observation."""
    sizes = [spec.cameras[name] for name in config.model.cameras]
    return sum(3 * height * width for height, width in sizes)


def observation_bytes(config: RunConfig, spec: EnvSpec, samples_per_step: int) -> int:
    """Pictures and states (float32) that all ranks keep from rollout to update."""
    return samples_per_step * (picture_bytes(config, spec) + 4 * spec.state_dim)


def saved_bytes(config: RunConfig, footprint: Footprint) -> int:
    """A checkpoint: weights and optimizer state."""
    memory = device_memory(config, footprint)
    return memory.weights + memory.optimizer
