"""What moves between ranks, on real process groups: see `exchange_ranks.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("exchange_ranks.py")
SCENARIOS = [
    "every_group_reaches_its_actor",
    "copies_become_what_was_trained",
    "a_copy_that_differs_is_found",
    "replicas_that_drift_apart_are_found",
    "ranks_that_mean_other_weights_say_so",
    "one_rank_with_a_gradient_that_is_not_finite_stops_all",
    "what_is_in_host_memory_comes_back",
    "initial_values_can_be_put_in_place",
    "a_mismatch_on_one_rank_stops_all",
]

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """Of each scenario and each of its placements: what ranks had to complain about."""
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {result["name"]: result["problems"] for result in results}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, problems):
    for of_placement in problems[name]:
        assert of_placement == {}, "\n".join(of_placement.values())


def test_every_scenario_is_looked_at(problems):
    assert list(problems) == SCENARIOS
