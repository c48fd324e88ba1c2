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
        ways = _device_ways(config, budget, rebudget)
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


def _device_ways(config: RunConfig, budget: Budget, rebudget: Rebudget) -> list[str]:
    """What makes every phase fit on every device: a single change, else several together."""
    if budget.purpose == "evaluating":
        few = [budget.fewer_simulators()] if _fits_without_simulators(budget) else []
        return few or ["the policy itself does not fit: a quantised preset, or a larger device"]
    ways = list(_single_changes(config, budget, rebudget))
    ways = ways or list(_together(config, budget, rebudget))
    adapted = _changed(config, "lora", rank=_LORA_RANK)
    if not config.lora.rank and rebudget(adapted, budget.demand.layout).fits_devices():
        ways.append(f"lora.rank = {_LORA_RANK}, as in the _lora presets")
    return ways or ["a quantised preset (_qlora), more actor devices, or larger ones"]


def _single_changes(config: RunConfig, budget: Budget, rebudget: Rebudget) -> Iterator[str]:
    layout = budget.demand.layout

    def fits(changed: RunConfig) -> bool:
        return rebudget(changed, layout).fits_devices()

    if _fits_without_simulators(budget):
        yield budget.fewer_simulators()
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


def _more_devices(config: RunConfig, layout: Layout, rebudget: Rebudget) -> Iterator[str]:
    if form_of(layout.roles) != "shared" or layout.nodes > 1:
        return
    number = 2 * layout.world_size
    while number <= _MOST_DEVICES and config.env.num_envs % number == 0:
        if rebudget(config, everywhere(number)).fits_devices():
            yield f"{number} devices"
            return
        number *= 2


def _together(config: RunConfig, budget: Budget, rebudget: Rebudget) -> Iterator[str]:
    """All changes at once, if that is enough."""
    on_gpus = budget.demand.on_gpus
    smallest, texts = _changed(config, "optim", micro_batch_size=1), ["optim.micro_batch_size = 1"]
    while change := next(_changes(smallest, on_gpus=on_gpus), None):
        text, smallest = change
        texts.append(text)
    if rebudget(smallest, budget.demand.layout).fits_devices():
        yield f"together {', '.join(texts)}"


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


def _fits_without_simulators(budget: Budget) -> bool:
    alone = replace(budget, demand=replace(budget.demand, simulators=None))
    return alone.fits_devices()


def _changed(config: RunConfig, section: str, **keys: Any) -> RunConfig:
    changed = getattr(config, section).model_copy(update=keys)
    return config.model_copy(update={section: changed})


def _of(need: int, capacity: int) -> str:
    return f"{need / GIB:.0f} of {capacity / GIB:.0f} GiB"
