"""Asks what the dynamic linker and EGL of this machine offer; run as a script of its own.

A graphics driver that is loaded into a process stays there, next to PyTorch's libraries, and a
broken one may crash it: `vlactl_libero.rendering` therefore runs this file in another interpreter,
without site packages.

    python -I -S probe.py LIBRARY ...   prints {"errors": {library: why it cannot be loaded or ""},
                                                "egl_devices": [number or null, ...]}

EGL's devices are in its order: ordinals in CUDA as this process numbers them, SOFTWARE for
renderers on the CPU, null for others: GPUs that CUDA_VISIBLE_DEVICES hides or of other makers.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

SOFTWARE = -1
EGL_EXTENSIONS = 0x3055
EGL_CUDA_DEVICE_NV = 0x323A
MAX_DEVICES = 10  # MuJoCo's binding looks no further


def load_errors(libraries: list[str]) -> dict[str, str]:
    """Library -> the linker's complaint, empty where it loads."""
    errors = {}
    for library in libraries:
        try:
            ctypes.CDLL(library)
            errors[library] = ""
        except OSError as error:
            errors[library] = str(error)
    return errors


def egl_devices() -> list[int | None]:
    """EGL's devices in its order: ordinal in CUDA, SOFTWARE, or None."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return []
    count, devices = ctypes.c_int(), (ctypes.c_void_p * MAX_DEVICES)()
    query = _extension(egl, b"eglQueryDevicesEXT", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    if query is None or not query(MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    return [_kind(egl, device) for device in devices[: count.value]]


def _kind(egl: ctypes.CDLL, device: int) -> int | None:
    describe = _extension(
        egl, b"eglQueryDeviceStringEXT", ctypes.c_void_p, ctypes.c_int, result=ctypes.c_char_p
    )
    if describe and b"EGL_MESA_device_software" in (describe(device, EGL_EXTENSIONS) or b""):
        return SOFTWARE
    query = _extension(
        egl, b"eglQueryDeviceAttribEXT", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
    )
    ordinal = ctypes.c_ssize_t(-1)
    found = query and query(device, EGL_CUDA_DEVICE_NV, ctypes.byref(ordinal))
    return ordinal.value if found and ordinal.value >= 0 else None


def _extension(
    egl: ctypes.CDLL, name: bytes, *arguments: type, result: type = ctypes.c_uint
) -> Callable[..., Any] | None:
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    address = egl.eglGetProcAddress(name)
    return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None


if __name__ == "__main__":
    report = {"errors": load_errors(sys.argv[1:]), "egl_devices": egl_devices()}
    sys.stdout.write(json.dumps(report))
