"""The toy policy imitates, is exported and comes back: the example that plugin authors read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from vlactl_toy.environment import make_spec
from vlactl_toy.plugin import ToyEnvConfig, ToyModelConfig, footprint
from vlactl_toy.policy import make_policy

from vlactl.api.contracts import Greedy, ModelContext, ObservationBatch, SupervisedBatch
from vlactl.api.plugins import FootprintContext
from vlactl.errors import ConfigError, IntegrityError

CONTEXT = ModelContext(
    env=make_spec(ToyEnvConfig()), device=torch.device("cpu"), dtype=torch.float32, seed=0
)
CONFIG = ToyModelConfig()


def imitate(num_rows=3):
    rng = np.random.default_rng(0)
    bins = rng.integers(0, 9, (num_rows, 4, 1))
    return SupervisedBatch(
        observations=ObservationBatch(
            images={"front": rng.integers(0, 256, (num_rows, 8, 8, 3), dtype=np.uint8)},
            state=rng.normal(size=(num_rows, 1)).astype(np.float32),
            instructions=("reach goal 0",) * num_rows,
        ),
        actions_SKA=(-1 + bins / 4).astype(np.float32),
        valid_SK=np.ones((num_rows, 4), bool),
    )


def export(policy, directory):
    directory.mkdir()
    policy.export(directory, adapter_only=False)
    return CONFIG.model_copy(update={"path": str(directory)})


def test_it_learns_a_batch_by_heart_and_acts_as_shown():
    policy, batch = make_policy(CONFIG, CONTEXT), imitate()
    optimizer = torch.optim.Adam(policy.module.parameters(), lr=3e-2)
    for _ in range(60):
        loss = policy.supervised_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    chunks = policy.act(batch.observations, Greedy(), [0] * 3)
    np.testing.assert_allclose(chunks.actions_BKA, batch.actions_SKA, atol=1e-6)


def test_actions_that_are_no_labels_do_not_count():
    policy, batch = make_policy(CONFIG, CONTEXT), imitate()
    valid = np.arange(4) < np.array([[4], [1], [2]])
    changed = np.where(valid[..., None], batch.actions_SKA, np.float32(0.25))
    one, other = (
        float(policy.supervised_loss(replace(batch, valid_SK=valid, actions_SKA=actions)).detach())
        for actions in (batch.actions_SKA, changed)
    )
    assert one == other


@pytest.mark.parametrize("values", ["none", "chunk"])
def test_it_comes_back_bit_by_bit(tmp_path, values):
    before = make_policy(CONFIG, replace(CONTEXT, values=values))
    after = make_policy(export(before, tmp_path / "one"), replace(CONTEXT, seed=5, values=values))
    state = before.module.state_dict()
    assert all(torch.equal(state[n], value) for n, value in after.module.state_dict().items())


def test_a_value_head_may_start_anew(tmp_path):
    config = export(make_policy(CONFIG, CONTEXT), tmp_path / "one")
    assert make_policy(config, replace(CONTEXT, values="action")).module.value_head is not None


def test_what_is_something_else_is_refused(tmp_path):
    config = export(make_policy(CONFIG, replace(CONTEXT, values="chunk")), tmp_path / "one")
    for wrong in ({"hidden": 8}, {"path": str(tmp_path)}):
        with pytest.raises(IntegrityError, match="not of this network"):
            make_policy(config.model_copy(update=wrong), CONTEXT)
    with pytest.raises(IntegrityError, match="not of this network"):
        make_policy(config, CONTEXT)  # its value head has no place
    with pytest.raises(ConfigError, match="no adapters"):
        make_policy(CONFIG, CONTEXT).export(tmp_path, adapter_only=True)


def test_footprint_is_the_size():
    parameters = make_policy(CONFIG, CONTEXT).module.parameters()
    assert footprint(CONFIG, FootprintContext()).parameters == sum(p.numel() for p in parameters)
