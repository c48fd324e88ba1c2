"""Numbers recorded from reference implementations: the shipped set, or VLACTL_GOLDENS."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def goldens() -> Path:
    folder = Path(os.environ.get("VLACTL_GOLDENS") or Path(__file__).parent / "data")
    if not folder.is_dir():
        pytest.fail(f"{folder} is not a folder of goldens")
    return folder


@pytest.fixture(scope="session")
def algorithm_case(goldens: Path) -> Callable[[str, str], SimpleNamespace]:
    """Reads a case of a topic: its parameters, and its inputs and outputs as tensors."""
    folder = goldens / "algorithms"

    def read(topic: str, case_id: str) -> SimpleNamespace:
        cases = json.loads((folder / f"{topic}.json").read_text())
        case = next(case for case in cases if case["id"] == case_id)
        with np.load(folder / f"{topic}.npz") as arrays:
            given = {name: torch.tensor(arrays[f"{case_id}/in/{name}"]) for name in case["inputs"]}
            want = {name: torch.tensor(arrays[f"{case_id}/out/{name}"]) for name in case["outputs"]}
        return SimpleNamespace(params=case["params"], given=given, want=want)

    return read
