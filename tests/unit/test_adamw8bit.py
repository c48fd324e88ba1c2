"""AdamW with moments of 8 bits, where bitsandbytes is installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlactl.config.run import OptimConfig
from vlactl.train.optim import make_optimizer, set_learning_rates

pytest.importorskip("bitsandbytes")


def test_it_heeds_rates_that_change():
    config = OptimConfig(lr=0.1, decay_steps=4, weight_decay=0.0, optimizer="adamw8bit")
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = make_optimizer([("weight", weight)], config)
    moved = []
    for step in range(6):
        before = weight.detach().clone()
        set_learning_rates(optimizer, config, step)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(float((before - weight.detach()).mean()))
    assert moved == pytest.approx([0.1, 0.0868, 0.055, 0.0232, 0.01, 0.01], rel=0.01)
