"""What every environment should test: the contract, and that episodes repeat."""

import numpy as np
from vlactl_example_env.environment import make_simulator
from vlactl_example_env.plugin import ReachConfig

from vlactl.api import conformance
from vlactl.api.contracts import EnvContext, Episode


def test_the_contract_is_kept() -> None:
    findings = conformance.check("environment", "example-reach")
    assert not conformance.failed(findings), findings


def test_the_same_episode_and_actions_give_the_same_results() -> None:
    simulator = make_simulator(ReachConfig(), EnvContext(num_slots=1, cameras=("front",)))
    episode = Episode(task=1, trial=2, group=0, member=0, seed=3)
    actions_KA = np.full((4, 2), 0.1)
    states = []
    for _ in range(2):
        simulator.begin(episode)
        result = simulator.advance(actions_KA)
        assert result.observation is not None
        states.append(result.observation.state)
    np.testing.assert_array_equal(*states)
