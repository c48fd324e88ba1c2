"""Which renderer simulators use, whether this machine has it, and the variables that select it.

OSMesa and EGL without a GPU are the same software renderer with the same pixels; EGL with a GPU is
another one. Nothing is loaded into this process: see `vlactl_libero.probe`.

EGL lists all GPUs of the machine in an order of its own, whatever CUDA_VISIBLE_DEVICES says. Its
extension EGL_NV_device_cuda names each by the handle that CUDA functions of the asking process
take: a position among the visible devices, like PyTorch's. The probe inherits this process's
variables, so that indices, UUIDs and reorderings need no interpretation here, and a GPU that is
hidden from CUDA has no ordinal.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vlactl.errors import EnvironmentNotReadyError
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.probe import SOFTWARE

LIBRARIES = {"osmesa": ("libOSMesa.so.8", "libOSMesa.so.6"), "egl": ("libEGL.so.1",)}
FIXES = {
    "osmesa": "apt-get install libosmesa6",
    "egl": "apt-get install libegl1 libgl1; in Docker also: -e NVIDIA_DRIVER_CAPABILITIES=all",
}
_PROBE_SECONDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphics:
    """What the probe found.

    Attributes:
        errors: library -> why it cannot be loaded, "" = it can.
        egl_devices: in EGL's order, ordinals in CUDA; SOFTWARE = renders on the CPU; None = hidden
            from CUDA, or no GPU of NVIDIA's.
    """

    errors: dict[str, str]
    egl_devices: list[int | None]

    @property
    def num_gpus(self) -> int:
        """GPUs that EGL and CUDA both know."""
        return len(set(self.egl_devices) - {SOFTWARE, None})

    def problem(self, renderer: str) -> str:
        """Why a renderer cannot be used, or ""."""
        errors = [self.errors[library] for library in LIBRARIES[renderer]]
        if all(errors):
            return errors[0]
        return "EGL finds no device" if renderer == "egl" and not self.egl_devices else ""


def probe(*libraries: str) -> Graphics:
    """Ask another interpreter about the renderers' libraries and further ones."""
    names = [name for group in LIBRARIES.values() for name in group] + list(libraries)
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("probe.py")), *names]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentNotReadyError(
            f"the graphics drivers of this machine do not answer within {_PROBE_SECONDS} s",
            hint=FIXES["egl"],
        ) from error
    if done.returncode:
        cause = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise EnvironmentNotReadyError(
            f"the graphics drivers of this machine cannot be examined: {cause}",
            hint=FIXES["osmesa"],
        )
    return Graphics(**json.loads(done.stdout))


def choose(config: LiberoConfig, device_index: int, graphics: Graphics) -> str:
    """The renderer to use, checked to be there.

    Args:
        config: its `renderer` may be "auto".
        device_index: GPU as numbered by CUDA in this process; -1 = none.
        graphics: what the machine has.

    Raises:
        EnvironmentNotReadyError: it cannot be loaded, or finds no device.
    """
    renderer = config.renderer
    if renderer == "auto":
        # Systems with a recent Mesa have no OSMesa; its EGL draws the same pixels.
        alone = graphics.problem("osmesa") and not graphics.problem("egl")
        renderer = "egl" if device_index >= 0 or alone else "osmesa"
    problem = graphics.problem(renderer)
    if problem:
        raise EnvironmentNotReadyError(
            f"LIBERO cannot render with {renderer}: {problem}", hint=_way_out(renderer)
        )
    return renderer


def variables(renderer: str, device_index: int, graphics: Graphics) -> dict[str, str]:
    """Environment variables that make MuJoCo and robosuite render there.

    Raises:
        EnvironmentNotReadyError: EGL does not know the GPU.
    """
    chosen = {"MUJOCO_GL": renderer, "PYOPENGL_PLATFORM": renderer}
    if renderer == "egl":
        # robosuite wants the EGL device among CUDA_VISIBLE_DEVICES, though EGL numbers devices on
        # its own. Simulators do not use CUDA, so both variables can name the EGL device.
        device = str(_egl_device(device_index, graphics))
        chosen |= {"MUJOCO_EGL_DEVICE_ID": device, "CUDA_VISIBLE_DEVICES": device}
    return chosen


def _way_out(renderer: str) -> str:
    other = '\nor render on the CPU, slowly: env.renderer = "osmesa"' * (renderer == "egl")
    return FIXES[renderer] + other


def _egl_device(device_index: int, graphics: Graphics) -> int:
    wanted = device_index if device_index >= 0 else SOFTWARE
    if wanted in graphics.egl_devices:
        return graphics.egl_devices.index(wanted)
    if wanted == SOFTWARE:
        message = "EGL has no device for software rendering"
    else:
        message = f"EGL has no device for GPU {wanted}, or it is a MIG slice, which cannot render"
    raise EnvironmentNotReadyError(message, hint=_way_out("egl"))
