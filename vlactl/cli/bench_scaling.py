"""`vlactl bench scaling`: what the planner and measured rates say about more devices.

Nothing is run. Every line is a plan for that many supposed devices, with the time that the rates
give it; a plan that cannot be made is a line too, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from vlactl.cli.output import print_table, print_text
from vlactl.errors import ConfigError, UserError

if TYPE_CHECKING:
    from vlactl.config.run import RunConfig
    from vlactl.launch.estimate import Estimate
    from vlactl.launch.hardware import Hardware
    from vlactl.launch.rates import Rates

PER_NODE = 8
_HEADER = ("devices", "rollout", "update", "weights", "step", "samples/s", "efficiency", "limit")
_EFFICIENT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One number of devices; `estimate` is None where there is no plan, `problem` says why."""

    devices: int
    samples: int
    estimate: Estimate | None
    problem: str = ""

    @property
    def speed(self) -> float:
        """Samples per second."""
        return self.samples / self.estimate.total if self.estimate else 0.0


def bench_scaling(
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="Preset name or .toml file.")
    ],
    devices: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of devices.")
    ] = "8,16,64,256,1024",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
) -> None:
    """Estimate steps on more devices than there are, from measured or published rates.

    \b
    Example:
      vlactl bench scaling --preset libero_10_grpo --devices 8,64,256,1024
    """  # noqa: D301
    from vlactl.config.compose import compose
    from vlactl.launch.hardware import detect

    numbers = _read_numbers(devices)
    config = compose(preset, set_ or ()).config
    hardware = detect()
    rates = _find_rates(config, hardware)
    simulators = max(1, config.env.num_envs // min(numbers[0], config.env.num_envs))
    strong = [_point(_same_batch(config, n, simulators), n, hardware, rates) for n in numbers]
    weak = [
        _point(_growing(config, n, numbers[0], simulators), n, hardware, rates) for n in numbers
    ]
    _show(f"the same batch of {config.rollout.episodes_per_step} trajectories", strong)
    _show(f"a batch that grows with the devices, from that of {numbers[0]}", weak)
    for line in _assumptions(config, rates, simulators):
        print_text(f" {line}")


def _show(title: str, points: Sequence[Point]) -> None:
    print_text(f" {title}\n")
    print_table(_rows(points), _HEADER)
    for point in points:
        if point.problem:
            print_text(f" {point.devices}: {point.problem}")
    print_text(f" {_where_it_stops(points)}\n")


def _read_numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    wrong = [n for n in numbers if n < 1 or (n > PER_NODE and n % PER_NODE)]
    if wrong:
        raise ConfigError(
            f'--devices "{text}": not numbers of devices',
            hint=f"up to {PER_NODE} on one machine, more in multiples of {PER_NODE}: 8,64,256",
        )
    return numbers


def _find_rates(config: RunConfig, hardware: Hardware) -> Rates:
    from vlactl.launch.plan import inference_rows, size_key
    from vlactl.launch.rates import Rates, measured, published

    device = hardware.device_name
    found = measured(device, size_key(config, device), config, inference_rows(config))
    return found if isinstance(found, Rates) else published(config)


def _same_batch(config: RunConfig, devices: int, simulators: int) -> RunConfig:
    """More devices bring more simulators, up to one for each episode."""
    number = min(devices * simulators, config.rollout.episodes_per_step)
    return config.model_copy(update={"env": config.env.model_copy(update={"num_envs": number})})


def _growing(config: RunConfig, devices: int, base: int, simulators: int) -> RunConfig:
    rollout, optim = config.rollout, config.optim
    larger = config.model_copy(
        update={
            "rollout": rollout.model_copy(
                update={"episodes_per_step": rollout.episodes_per_step * devices // base}
            ),
            "optim": optim.model_copy(
                update={"global_batch_size": optim.global_batch_size * devices // base}
            ),
        }
    )
    return _same_batch(larger, devices, simulators)


def _point(config: RunConfig, devices: int, hardware: Hardware, rates: Rates) -> Point:
    from vlactl.launch.estimate import estimate
    from vlactl.launch.hardware import suppose_gpus
    from vlactl.launch.plan import make_plan, model_footprint

    per_node = min(devices, PER_NODE)
    supposed = suppose_gpus(hardware, per_node)
    try:
        plan = make_plan(config, supposed, gpus=per_node, nodes=math.ceil(devices / PER_NODE))
    except UserError as error:
        return Point(devices=devices, samples=0, estimate=None, problem=error.message)
    memory = [line for line in plan.blockers if "GiB" in line]
    if memory:
        return Point(devices=devices, samples=0, estimate=None, problem=memory[0])
    found = estimate(plan, config, model_footprint(config), rates)
    return Point(devices=devices, samples=plan.samples_per_step, estimate=found)


def _rows(points: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    from vlactl.launch.estimate import readable_seconds

    for point in points:
        if point.estimate is None:
            continue
        phases = point.estimate.phases
        times = (phases["rollout"], phases["update"], phases["weights"], point.estimate.total)
        yield (
            str(point.devices),
            *(readable_seconds(seconds) for seconds in times),
            f"{point.speed:.0f}",
            f"{_efficiency(points, point):.0%}",
            point.estimate.limit,
        )


def _efficiency(points: Sequence[Point], point: Point) -> float:
    """Samples per second and device, against those of the fewest devices that have a plan."""
    first = next(other for other in points if other.estimate)
    return (point.speed / point.devices) / (first.speed / first.devices)


def _where_it_stops(points: Sequence[Point]) -> str:
    good = [p.devices for p in points if p.estimate and _efficiency(points, p) >= _EFFICIENT]
    if not good:
        return "there is no plan for any of these"
    text = f"at least {_EFFICIENT:.0%} efficient up to {good[-1]} devices"
    beyond = [point for point in points if point.devices > good[-1]]
    if not beyond:
        return text
    reason = "there is no plan" if beyond[0].problem else "the efficiency is less"
    return f"{text}; at {beyond[0].devices} {reason}"


def _assumptions(config: RunConfig, rates: Rates, simulators: int) -> Iterator[str]:
    from vlactl.launch.estimate import BOUNDS, HOP_SECONDS
    from vlactl.launch.hardware import ASSUMED_CORES, ASSUMED_GPU_GIB, ASSUMED_HOST_GIB
    from vlactl.launch.plan import model_footprint

    yield "nothing was run: plans for supposed machines, and arithmetic"
    size = model_footprint(config).parameters / 1e9
    yield f"rates: {rates.source}; this policy has {size:.3g} billion parameters"
    yield (
        f"machines of {PER_NODE} devices like this one's, or of {ASSUMED_GPU_GIB} GiB, with "
        f"{ASSUMED_CORES} cores and {ASSUMED_HOST_GIB} GiB each; {simulators} simulators per device"
    )
    yield (
        f"traffic at {rates.within / 1e9:.0f} GB/s within a machine and {rates.between / 1e9:.0f} "
        f"GB/s between machines, {1e6 * HOP_SECONDS:.0f} us from rank to rank: assumed, and hidden "
        "behind computation where it fits"
    )
    yield f"{BOUNDS}; no rank is slower than another; evaluation and saving are left out"
    yield "the batch decides what is learned: one that grows needs other learning rates"
