"""The last look at a machine before a job starts on it."""

import shutil
from types import SimpleNamespace

import pytest

from vlactl.config.compose import compose
from vlactl.errors import EnvironmentNotReadyError
from vlactl.launch.hardware import GIB, Hardware, suppose_gpus
from vlactl.launch.plan import make_plan
from vlactl.launch.preflight import check_machine

CONFIG = compose("toy_grpo").config
CPU = Hardware(cores=16, ram_bytes=64 * GIB)


def test_shared_memory_that_is_too_small_is_told_before_anything_starts(monkeypatch):
    """Row 21: containers get 64 MiB, of which little is left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30 * 2**20))
    several = make_plan(CONFIG, suppose_gpus(CPU, 2), gpus=2)
    with pytest.raises(EnvironmentNotReadyError, match=r"30\.0 MiB free.*need 64\.0 MiB") as caught:
        check_machine(CONFIG, several)
    assert caught.value.hint == "docker run --shm-size=8g"
    check_machine(CONFIG, make_plan(CONFIG, CPU, gpus=2))  # without GPUs nothing lies there
