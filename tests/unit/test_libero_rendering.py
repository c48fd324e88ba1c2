"""Which EGL device renders for a GPU, from what probes answer: no simulator and no GPU.

EGL lists the machine's GPUs in its own order; the probe notes each one's ordinal in CUDA under the
CUDA_VISIBLE_DEVICES of the process that asks. -1 = renders on the CPU, None = hidden from CUDA.
The probe itself is tried with a library that answers as NVIDIA's and Mesa's do.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from vlactl_libero import checks, rendering
from vlactl_libero.plugin import LiberoConfig
from vlactl_libero.probe import SOFTWARE
from vlactl_libero.rendering import Graphics

from vlactl.errors import EnvironmentNotReadyError

HIDDEN = None
LIBRARIES = {"libOSMesa.so.8": "", "libOSMesa.so.6": "absent", "libEGL.so.1": ""}
# A machine with four GPUs, which EGL lists in the order 2, 3, 0, 1 before Mesa's renderer.
ANSWERS = {
    None: [2, 3, 0, 1, SOFTWARE],
    "2,3": [0, 1, HIDDEN, HIDDEN, SOFTWARE],
    "3,0,2": [2, 0, 1, HIDDEN, SOFTWARE],
    "GPU-3e,GPU-1c": [HIDDEN, 0, HIDDEN, 1, SOFTWARE],
    "": [HIDDEN, HIDDEN, HIDDEN, HIDDEN, SOFTWARE],
}


def device_of(answer: list[int | None], device_index: int) -> str:
    graphics = Graphics(errors=LIBRARIES, egl_devices=answer)
    return rendering.variables("egl", device_index, graphics)["MUJOCO_EGL_DEVICE_ID"]


@pytest.mark.parametrize(
    ("visible", "egl_indices"),
    [
        (None, ["2", "3", "0", "1"]),
        ("2,3", ["0", "1"]),
        ("3,0,2", ["1", "2", "0"]),
        ("GPU-3e,GPU-1c", ["1", "3"]),
        ("", []),
    ],
)
def test_ranks_render_on_the_gpus_that_cuda_shows_them(
    visible: str | None, egl_indices: list[str]
) -> None:
    answer = ANSWERS[visible]
    found = [device_of(answer, ordinal) for ordinal in range(len(egl_indices))]
    assert found == egl_indices
    assert Graphics(errors=LIBRARIES, egl_devices=answer).num_gpus == len(egl_indices)
    with pytest.raises(EnvironmentNotReadyError, match=f"no device for GPU {len(egl_indices)}"):
        device_of(answer, len(egl_indices))


@pytest.mark.parametrize("visible", list(ANSWERS))
def test_without_a_gpu_egl_never_renders_on_a_hidden_one(visible: str | None) -> None:
    assert device_of(ANSWERS[visible], -1) == "4"


def test_software_rendering_that_is_not_there() -> None:
    with pytest.raises(EnvironmentNotReadyError, match="no device for software rendering"):
        device_of([HIDDEN, 0], -1)


def test_a_gpu_that_egl_does_not_know_is_no_reason_to_render_elsewhere() -> None:
    graphics = Graphics(errors=LIBRARIES, egl_devices=[SOFTWARE])
    renderer = rendering.choose(LiberoConfig(), 0, graphics)
    with pytest.raises(EnvironmentNotReadyError, match="no device for GPU 0") as caught:
        rendering.variables(renderer, 0, graphics)
    assert "NVIDIA_DRIVER_CAPABILITIES=all" in caught.value.hint
    assert 'env.renderer = "osmesa"' in caught.value.hint


def test_a_gpu_that_two_vendors_list_counts_once() -> None:
    twice = Graphics(errors=LIBRARIES, egl_devices=[0, 1, 0, 1, SOFTWARE])
    assert twice.num_gpus == 2
    assert rendering.variables("egl", 1, twice)["MUJOCO_EGL_DEVICE_ID"] == "1"


@pytest.mark.parametrize(
    ("visible", "detail"), [("2,3", "2 GPUs"), ("", "renders on the CPU (no GPU)")]
)
def test_doctor_counts_gpus_that_both_know(visible: str, detail: str) -> None:
    graphics = Graphics(errors=LIBRARIES, egl_devices=ANSWERS[visible])
    found = {finding.subject: finding.detail for finding in checks._renderers(graphics)}
    assert found["renderer egl"] == detail


DRIVER = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static unsigned query_devices(int room, void **devices, int *count) {
    for (*count = 0; *count < 4 && *count < room; ++*count)
        devices[*count] = (void *)(intptr_t)(*count + 1);
    return 1;
}

static const char *query_string(void *device, int name) {
    return device == (void *)4 && name == 0x3055 ? "EGL_MESA_device_software EGL_X" : "EGL_Y";
}

/* The driver counts as CUDA does: by position among the visible devices. */
static unsigned query_attribute(void *device, int name, intptr_t *value) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    const char *place = visible ? strchr(visible, '0' + (int)(intptr_t)device) : NULL;
    if (name != 0x323A || place == NULL) return 0;
    *value = (place - visible) / 2;
    return 1;
}

void *eglGetProcAddress(const char *name) {
    if (!strcmp(name, "eglQueryDevicesEXT")) return query_devices;
    if (!strcmp(name, "eglQueryDeviceStringEXT")) return query_string;
    if (!strcmp(name, "eglQueryDeviceAttribEXT")) return query_attribute;
    return NULL;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("visible", "answer"),
    [
        ("2,3", [HIDDEN, 0, 1, SOFTWARE]),
        ("3,1", [1, HIDDEN, 0, SOFTWARE]),
        ("", [HIDDEN, HIDDEN, HIDDEN, SOFTWARE]),
    ],
)
def test_probe_asks_as_the_process_that_starts_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    answer: list[int | None],
) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "libEGL.so.1"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert rendering.probe().egl_devices == answer
