"""Estimates of memory: what a run holds on each device and on the host, and whether it fits.

Counted on the device: weights, a second copy of them where a reference policy is needed, gradients
and the two AdamW moments of what is trained, all in `train.dtype`, the activations of one
micro-batch as the model plugin states them, and what simulators draw with as the environment plugin
states it. Not counted: float32 master weights (the optimizer works in `train.dtype`), allocator
slack.

Counted on the host: the pictures and states of a step, simulators, and what CPU ranks compute with.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlactl.api.contracts import EnvSpec
from vlactl.api.plugins import EnvironmentFootprint, Footprint
from vlactl.config.run import RunConfig
from vlactl.launch.hardware import GIB, readable

_BYTES = {"float32": 4, "bfloat16": 2}
_ADAM_MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device while the policy is updated, or while it acts."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    simulators: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        training = self.gradients + self.optimizer + self.activations
        return self.weights + training + self.simulators

    def describe(self, capacity: int) -> str:
        """One line, in the unit that fits the total."""
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        parts = (
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("simulators", self.simulators),
        )
        terms = " + ".join(f"{label} {size / unit:.1f}" for label, size in parts if size)
        return f"{terms} = {self.total / unit:.1f} {name} of {capacity / GIB:.1f} GiB per rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of the machine's memory, all ranks together.

    Attributes:
        ranks: what ranks without a GPU compute with.
        observations: pictures and states of a step.
        simulators: None = their environment does not tell.
    """

    ranks: int
    observations: int
    simulators: EnvironmentFootprint | None

    @property
    def total(self) -> int:
        """All that is known."""
        simulators = self.simulators.host_bytes if self.simulators else 0
        return self.ranks + self.observations + simulators

    def describe(self, capacity: int | None) -> str:
        """One line."""
        parts = [("ranks", self.ranks), ("observations of a step", self.observations)]
        if self.simulators:
            count = self.simulators.num_processes
            label = f"{count} simulator {'process' if count == 1 else 'processes'}"
            parts.append((label, self.simulators.host_bytes))
        terms = " + ".join(f"{label} {readable(size)}" for label, size in parts if size)
        limit = "" if capacity is None else f" of {readable(capacity)}"
        extra = "" if self.simulators else "; simulators extra"
        return (
            f"host: {terms} = {readable(self.total)}{limit}, all ranks together{extra} (estimate)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run needs against what there is.

    Attributes:
        purpose: "training" or "evaluating".
        device: on the fullest device.
        device_capacity: of a GPU, or a CPU rank's share of the host.
        host: on this machine.
        host_capacity: None = that of a machine that is only supposed.
    """

    purpose: str
    device: DeviceMemory
    device_capacity: int
    host: HostMemory
    host_capacity: int | None

    def lines(self) -> tuple[str, ...]:
        """The estimates, for a person."""
        device = f"{self.device.describe(self.device_capacity)} (estimate)"
        return device, self.host.describe(self.host_capacity)

    def blockers(self) -> tuple[str, ...]:
        """What does not fit, one line each, with the way out."""
        return tuple(line for line in (self._device_blocker(), self._host_blocker()) if line)

    def _device_blocker(self) -> str:
        need, capacity = self.device, self.device_capacity
        if need.total <= capacity:
            return ""
        way_out = "sharding the model over ranks is planned but not built yet"
        if need.total - need.activations <= capacity:
            way_out = "lower optim.micro_batch_size"
        if need.total - need.simulators <= capacity:
            way_out = self._fewer_simulators()
        amount = f"{need.total / GIB:.0f} of {capacity / GIB:.0f} GiB per rank"
        return f"{self.purpose} needs about {amount}: {way_out}"

    def _host_blocker(self) -> str:
        need, capacity = self.host, self.host_capacity
        if capacity is None or need.total <= capacity or need.ranks > capacity:
            return ""  # what ranks compute with is told by the device's line
        way_out = "lower rollout.episodes_per_step"
        if need.ranks + need.observations <= capacity:
            way_out = self._fewer_simulators()
        amount = f"{need.total / GIB:.0f} of {capacity / GIB:.0f} GiB of this machine's memory"
        return f"{self.purpose} and its simulators need about {amount}: {way_out}"

    def _fewer_simulators(self) -> str:
        simulators = self.host.simulators
        return ", ".join(["lower env.num_envs", *(simulators.ways_out if simulators else ())])


def device_memory(
    config: RunConfig, footprint: Footprint, simulators: EnvironmentFootprint | None = None
) -> DeviceMemory:
    """What the update needs on a device that holds the whole model, and its simulators."""
    trained = footprint.trainable * _BYTES[config.train.dtype]
    has_copy = config.algorithm.needs().reference and config.lora.rank == 0
    copies = 2 if has_copy else 1  # adapters are switched off instead
    return DeviceMemory(
        weights=round(copies * footprint.parameters * footprint.bytes_per_parameter),
        gradients=trained,
        optimizer=_ADAM_MOMENTS * trained,
        activations=footprint.activation_bytes * config.optim.micro_batch_size,
        simulators=simulators.device_bytes if simulators else 0,
    )


def acting_memory(footprint: Footprint, simulators: EnvironmentFootprint | None) -> DeviceMemory:
    """What a policy that is not trained needs on its device, and its simulators."""
    return DeviceMemory(
        weights=round(footprint.parameters * footprint.bytes_per_parameter),
        simulators=simulators.device_bytes if simulators else 0,
    )


def picture_bytes(config: RunConfig, spec: EnvSpec) -> int:
    """The pictures (uint8 RGB) of one observation."""
    sizes = [spec.cameras[name] for name in config.model.cameras]
    return sum(3 * height * width for height, width in sizes)


def observation_bytes(config: RunConfig, spec: EnvSpec, samples_per_step: int) -> int:
    """Pictures and states (float32) that all ranks keep from rollout to update."""
    return samples_per_step * (picture_bytes(config, spec) + 4 * spec.state_dim)


def saved_bytes(config: RunConfig, footprint: Footprint) -> int:
    """A checkpoint: weights, of which only adapters where there are some, and optimizer state."""
    bytes_per_value = _BYTES[config.train.dtype]
    saved = footprint.trainable if config.lora.rank else footprint.parameters
    return bytes_per_value * (saved + _ADAM_MOMENTS * footprint.trainable)
