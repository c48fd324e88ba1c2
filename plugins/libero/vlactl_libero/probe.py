"""Asks what the dynamic linker and EGL of this machine offer; run as a script of its own.

A graphics driver that is loaded into a process stays there, next to PyTorch's libraries, and a
broken one may crash it: `vlactl_libero.rendering` therefore runs this file in another interpreter,
without site packages.

    python -I -S probe.py LIBRARY ...   prints {"errors": {library: why it cannot be loaded or ""},
                                                "egl_devices": [CUDA ordinal or null, ...]}
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

EGL_CUDA_DEVICE_NV = 0x323A
MAX_DEVICES = 64


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
    """EGL's devices in its order, each with its ordinal in CUDA; None for software renderers."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return []
    count, devices = ctypes.c_int(), (ctypes.c_void_p * MAX_DEVICES)()
    query = _extension(egl, b"eglQueryDevicesEXT", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    if query is None or not query(MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    attribute = _extension(
        egl, b"eglQueryDeviceAttribEXT", ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
    )
    ordinals: list[int | None] = []
    for device in devices[: count.value]:
        ordinal = ctypes.c_ssize_t()
        found = attribute and attribute(device, EGL_CUDA_DEVICE_NV, ctypes.byref(ordinal))
        ordinals.append(ordinal.value if found else None)
    return ordinals


def _extension(egl: ctypes.CDLL, name: bytes, *arguments: type) -> Callable[..., int] | None:
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    address = egl.eglGetProcAddress(name)
    return ctypes.CFUNCTYPE(ctypes.c_uint, *arguments)(address) if address else None


if __name__ == "__main__":
    report = {"errors": load_errors(sys.argv[1:]), "egl_devices": egl_devices()}
    sys.stdout.write(json.dumps(report))
