"""Real LIBERO on the CPU renderer, inside the test process where a test looks into it."""

from __future__ import annotations

import pytest
from vlactl_libero.environment import simulator_variables
from vlactl_libero.plugin import LiberoConfig


@pytest.fixture(scope="session", autouse=True)
def _simulator_variables():
    """The variables of simulator processes: MuJoCo and LIBERO read them as they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in simulator_variables(LiberoConfig(renderer="osmesa"), -1).items():
            patch.setenv(name, value)
        yield
