"""Numbers recorded from reference implementations: the shipped set, or VLACTL_GOLDENS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def goldens() -> Path:
    folder = Path(os.environ.get("VLACTL_GOLDENS") or Path(__file__).parent / "data")
    if not folder.is_dir():
        pytest.fail(f"{folder} is not a folder of goldens")
    return folder
