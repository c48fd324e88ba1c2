"""What does not fit into memory, and what would make it fit: every way out is tried first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from vlactl.config.run import RunConfig
from vlactl.launch.hardware import GIB
from vlactl.launch.layout import Layout, everywhere, form_of
from vlactl.launch.memory import CHECKPOINT, SIMULATORS, Budget, largest_fitting

Rebudget = Callable[[RunConfig, Layout], Budget]
"""The budget of a changed configuration, or of another layout."""

_LORA_RANK = 32
_MOST_DEVICES = 64


def memory_blockers(config: RunConfig, budget: Budget, rebudget: Rebudget) -> tuple[str, ...]:
    """What does not fit, one line each, with what would help."""
    lines = []
    if not budget.fits_devices():
        phase = max(budget.phases, key=budget.need)
        ways = list(_device_ways(config, budget, rebudget)) or [_together(config, budget, rebudget)]
        lines.append(
            f"{budget.purpose} needs about {_of(budget.need(phase), budget.device_capacity)} "
            f"per rank in the {phase}: {' or '.join(ways)}"
        )
    if not budget.fits_host():
        ways = list(_host_ways(config, budget, rebudget)) or [budget.fewer_simulators()]
        lines.append(
            f"{budget.purpose} and its simulators need about "
            f"{_of(budget.host_need(), budget.host_capacity)} of this machine's memory: "
            f"{' or '.join(ways)}"
        )
    return tuple(lines)


def _device_ways(config: RunConfig, budget: Budget, rebudget: Rebudget) -> Iterator[str]:
    """Single changes that make every phase fit on every device."""
    layout = budget.demand.layout

    def fits(changed: RunConfig) -> bool:
        return rebudget(changed, layout).fits_devices()

    if _without_simulators(budget).fits_devices():
        yield budget.fewer_simulators()
    if budget.purpose == "evaluating":
        return
    size = largest_fitting(
        config.optim.micro_batch_size,
        lambda n: fits(_changed(config, "optim", micro_batch_size=n)),
    )
    if size:
        yield f"optim.micro_batch_size = {size}"
    for text, changed in _changes(config, on_gpus=budget.demand.on_gpus):
        if fits(changed):
            yield text
    yield from _more_devices(config, layout, rebudget)


def _changes(config: RunConfig, *, on_gpus: bool) -> Iterator[tuple[str, RunConfig]]:
    """Keys that save memory on devices and are not set so yet."""
    train, trains_all = config.train, config.lora.rank == 0
    if train.activation_checkpointing != "full":
        text = "train.activation_checkpointing = full"
        yield text, _changed(config, "train", activation_checkpointing="full")
    if train.offload == "never" and on_gpus:
        yield "train.offload = auto", _changed(config, "train", offload="auto")
    if trains_all and not train.sharding:
        yield "train.sharding = true", _changed(config, "train", sharding=True)
    if trains_all and config.optim.optimizer == "adamw" and on_gpus:
        yield "optim.optimizer = adamw8bit", _changed(config, "optim", optimizer="adamw8bit")
    if trains_all:
        text = f"lora.rank = {_LORA_RANK}, as in the _lora presets"
        yield text, _changed(config, "lora", rank=_LORA_RANK)


def _more_devices(config: RunConfig, layout: Layout, rebudget: Rebudget) -> Iterator[str]:
    if form_of(layout.roles) != "shared" or layout.nodes > 1:
        return
    number = 2 * layout.world_size
    while number <= _MOST_DEVICES and config.env.num_envs % number == 0:
        if rebudget(config, everywhere(number)).fits_devices():
            yield f"{number} devices"
            return
        number *= 2


def _together(config: RunConfig, budget: Budget, rebudget: Rebudget) -> str:
    """What helps when no single change does."""
    if budget.purpose == "evaluating":
        return "the policy itself does not fit: a quantised preset, or a larger device"
    smallest, texts = _changed(config, "optim", micro_batch_size=1), ["optim.micro_batch_size = 1"]
    for text, _ in _changes(config, on_gpus=budget.demand.on_gpus):
        if text.startswith("lora"):
            continue
        smallest = dict(_changes(smallest, on_gpus=budget.demand.on_gpus))[text]
        texts.append(text)
    if rebudget(smallest, budget.demand.layout).fits_devices():
        return f"together: {', '.join(texts)}"
    return "a quantised preset (_qlora), more actor devices, or larger ones"


def _host_ways(config: RunConfig, budget: Budget, rebudget: Rebudget) -> Iterator[str]:
    parts = budget.demand.host(budget.offload, spill=budget.spill)
    over = budget.host_need() - budget.host_capacity
    if parts.get(CHECKPOINT, 0) >= over:
        yield "checkpoint.background = false"
    if parts.get(SIMULATORS, 0) > over:
        yield budget.fewer_simulators()
    if budget.offload:
        kept = rebudget(_changed(config, "train", offload="never"), budget.demand.layout)
        if kept.fits_devices() and kept.fits_host():
            yield "train.offload = never"


def _without_simulators(budget: Budget) -> Budget:
    return replace(budget, demand=replace(budget.demand, simulators=None))


def _changed(config: RunConfig, section: str, **keys: Any) -> RunConfig:
    changed = getattr(config, section).model_copy(update=keys)
    return config.model_copy(update={section: changed})


def _of(need: int, capacity: int) -> str:
    return f"{need / GIB:.0f} of {capacity / GIB:.0f} GiB"
