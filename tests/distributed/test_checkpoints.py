"""Checkpoints on several ranks: other placements, and faults that only one rank sees.

One process imports torch once and forks the ranks of all scenarios (`checkpoint_ranks.py`), which
use real process groups; each scenario is a test of its own here.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vlactl.hub.manifest import newest_checkpoint
from vlactl.train.checkpoint import load_checkpoint

SCRIPT = Path(__file__).with_name("checkpoint_ranks.py")
SCENARIOS = [
    "two_shards_are_saved_while_training_goes_on",
    "the_same_placement_goes_on_exactly",
    "other_numbers_of_shards_go_on",
    "shards_become_replicas",
    "replicas_become_shards",
    "the_main_rank_need_not_be_an_actor",
    "gathered_parameters_are_saved_as_shards",
    "adapters_beside_sharded_weights",
    "a_write_that_fails_on_one_rank_fails_on_both",
    "what_fails_before_writing_fails_on_both",
    "a_bad_shard_is_bad_for_both",
    "ranks_that_see_other_directories_say_so",
]
DEADLY = "a_rank_dies_while_both_are_writing"

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # read without ranks
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def problems(root) -> dict[str, list[dict[str, str]]]:
    """Of each scenario and each of its placements: what ranks had to complain about."""
    command = [sys.executable, str(SCRIPT), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["name"]: result["problems"] for result in results}


def test_every_scenario_is_looked_at(problems):
    assert list(problems) == [*SCENARIOS, DEADLY]


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_agree(problems, name):
    texts = [f"rank {rank} {text}" for each in problems[name] for rank, text in each.items()]
    assert not texts, "\n".join(texts)


def test_a_dead_rank_keeps_nobody(problems, root):
    """Row 26: the other one is gone long before it would be killed, and nothing is published."""
    ((survivor, dead),) = (each.values() for each in problems[DEADLY])
    assert dead.startswith(f"exit code {-signal.SIGKILL}")
    assert survivor.startswith("exit code 1")
    assert "peer" in survivor
    assert newest_checkpoint(root / "two")[0].name == "step-000003"


@pytest.mark.parametrize("run", ["two", "from-4", "from-1", "replicas", "apart-2-True"])
def test_a_process_without_ranks_reads_them_all(problems, root, run):
    assert problems
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    path, skipped = newest_checkpoint(root / run)
    assert not skipped
    assert load_checkpoint(path, module) == 3
    expected = torch.load(root / "after-3-0")
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"]), name
