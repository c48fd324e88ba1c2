"""AdamW with moments in 8 bits, by bitsandbytes, for parameters that may be sharded.

bitsandbytes knows nothing of shards: it is given this rank's part of every parameter as a tensor of
its own. Quantisation is per block of 256 numbers of a shard, so results depend a little on the
number of ranks.

Its state is saved as that of torch's AdamW: moments in float32, named and sharded like parameters.
A checkpoint fits any number of ranks and either optimizer; quantising its moments again moves some
of them by a quantisation step, so that a resumed run is close to one that was never stopped, but
not equal to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vlactl.distributed.sharding import local, sharded_like

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW8bit(torch.optim.Optimizer):
    """See the module's docstring; arguments as for `torch.optim.AdamW`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        from bitsandbytes.optim.adamw import AdamW8bit

        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._shards: dict[torch.Tensor, nn.Parameter] = {
            p: nn.Parameter(local(p.detach()), requires_grad=False) for p in self._parameters()
        }
        self._inner = AdamW8bit(
            [{**g, "params": [self._shards[p] for p in g["params"]]} for g in self.param_groups],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        for number, group in enumerate(self._inner.param_groups):
            for index, shard in enumerate(group["params"]):
                self._inner.init_state(group, shard, number, index)
        self.state = self._inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for parameter, shard in self._shards.items():
            is_empty = shard.numel() == 0  # there are fewer rows than ranks
            gradient = parameter.grad
            shard.grad = None if gradient is None or is_empty else local(gradient)
        for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = ours["lr"]
        self._inner.step()
        for shard in self._shards.values():
            shard.grad = None

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Step and moments of a parameter, as torch's AdamW would have them: copies."""
        state = self.state[self._shards[parameter]]
        moments = {
            name: sharded_like(_read(state, index), parameter)
            for index, name in enumerate(_MOMENTS, 1)
        }
        return {"step": torch.tensor(float(state["step"])), **moments}

    @torch.no_grad()
    def load_moments(self, parameter: torch.Tensor, saved: Mapping[str, torch.Tensor]) -> None:
        """Take over what `moments` returned, or the state of torch's AdamW."""
        state = self.state[self._shards[parameter]]
        state["step"] = int(saved["step"])
        for index, name in enumerate(_MOMENTS, 1):
            _store(state, index, local(saved[name]))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])


def _read(state: dict[str, Any], index: int) -> torch.Tensor:
    """A moment in float32; small tensors are kept so."""
    from bitsandbytes.functional import dequantize_blockwise

    values: torch.Tensor = state[f"state{index}"]
    if values.dtype == torch.float32 or values.numel() == 0:
        return values.float().clone()
    scale, code = state[f"absmax{index}"], state[f"qmap{index}"]
    read: torch.Tensor = dequantize_blockwise(values, absmax=scale, code=code, blocksize=256)
    return read


def _store(state: dict[str, Any], index: int, moment: torch.Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    values: torch.Tensor = state[f"state{index}"]
    moment = moment.to(values.device, torch.float32)
    if values.dtype == torch.float32 or values.numel() == 0:
        values.copy_(moment)
        return
    quantised, how = quantize_blockwise(moment, code=state[f"qmap{index}"], blocksize=256)
    values.copy_(quantised.view_as(values))
    state[f"absmax{index}"].copy_(how.absmax)
