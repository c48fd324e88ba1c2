"""Row 26: ranks of a real training run are killed wherever it hurts."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.faults,
    pytest.mark.dist,
    pytest.mark.timeout(400),  # several starts of torchrun
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
STEPS = ["train.max_steps=4", "checkpoint.every=1", "train.max_restarts=1"]
APART = ["placement.env=0", "placement.rollout=1", "placement.actor=0-1"]


def test_killed_ranks_are_named_and_cost_nothing(
    train: Callable, same_results: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank dies while it serves, updates and saves: three attempts, and the result of one."""
    expected = train(*STEPS, *APART, ranks=2)
    faults = ("1:rollout:1:SIGKILL", "0:update:2:SIGKILL", "1:checkpoint:3:SIGKILL")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    monkeypatch.setenv("FAULTS", ",".join(faults))
    monkeypatch.setenv("FAULT_MARKS", str(tmp_path))
    told: list[str] = []
    run = train(*STEPS, *APART, ranks=2, worker_module="faulty_worker", lines=told)
    deaths = [line.partition(";")[0] for line in told if "starting again" in line]
    assert deaths == [
        "rank 1 was killed by SIGKILL in rollout of step 2",
        "rank 0 was killed by SIGKILL in update of step 3",
        "rank 1 was killed by SIGKILL in checkpoint of step 4",
    ]
    assert run.numbers == expected.numbers
    assert all((run.weights[name] == value).all() for name, value in expected.weights.items())
    same_results(expected, run)
