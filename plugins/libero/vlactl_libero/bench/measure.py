"""The benchmark: who plays when, and what is made of the times.

The contenders take turns, so that a noisy machine hurts them alike, and a ratio compares the two
halves of one round. Their simulators live side by side, but only one side works at a time. What
is compiled once per machine is compiled before any clock starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from statistics import mean, median
from time import perf_counter
from typing import Any

from vlactl.api.contracts import EnvContext
from vlactl.api.plugins import BenchOptions, BenchReport
from vlactl_libero.bench import expected
from vlactl_libero.bench.contender import Contender
from vlactl_libero.bench.memory import used_gpu_memory
from vlactl_libero.bench.progress import LABELS, Forecast, Say, about, count, phase
from vlactl_libero.bench.table import HEADER, make_notes, make_rows, three_digits
from vlactl_libero.bench.workload import (
    CHECK_STEPS,
    Played,
    Script,
    Seen,
    Setup,
    deal,
    lend,
    read_scripts,
    spread_tasks,
)
from vlactl_libero.environment import (
    draws_on_gpu,
    make_environment,
    num_processes,
    simulator_variables,
)
from vlactl_libero.plugin import PLUGIN, LiberoConfig
from vlactl_libero.scripted import FIXTURE_SEED
from vlactl_libero.tasks import make_spec, suite_tasks

STOCK, OURS = "stock", "ours"
PLAYED_WITH = {
    "fixture_poses": "fixed",
    "fixture_seed": FIXTURE_SEED,
    "ignore_terminations": False,
    "sampled_trials": 0,
}
"""As scripted episodes were recorded, and the same on both sides."""
FURTHER = 4
"""Simulators that join one of the same task and process, to see what they add."""
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The two contenders, ready to play, and how they are asked to."""

    sides: Mapping[str, Contender]
    tasks: tuple[int, ...]
    num_trials: int
    options: BenchOptions
    forecast: Forecast
    say: Say


def bench(config: LiberoConfig, options: BenchOptions, say: Say) -> BenchReport:
    """Compare vlactl's simulators with stock LIBERO.

    Raises:
        UserError: LIBERO or a renderer is not as it should be, or simulators fail.
    """
    config = config.model_copy(update=PLAYED_WITH)
    context = EnvContext(num_slots=1, cameras=options.cameras, device_index=options.device_index)
    make_environment(config, context).close()  # says what is missing before anything is started
    variables = simulator_variables(config, options.device_index)
    scripts = read_scripts(config.full_suite) if options.episodes else []
    setup = Setup(
        side=OURS,
        config=config,
        tasks=spread_tasks(config, scripts),
        cameras=options.cameras,
        device_index=options.device_index,
        chunk_length=options.chunk_length,
    )
    forecast = _foresee(setup, options, scripts)
    record = _describe(setup, forecast, variables)
    say(f"{count(config.num_envs, 'simulator')} on each side: {about(forecast.total(1 + FURTHER))}")
    _warm_up(setup, variables, forecast, say)
    with (
        Contender(replace(setup, side=STOCK), variables) as stock,
        Contender(setup, variables) as ours,
    ):
        run = Bench(
            sides={STOCK: stock, OURS: ours},
            tasks=setup.tasks,
            num_trials=min(task.num_trials for task in make_spec(config).tasks),
            options=options,
            forecast=forecast,
            say=say,
        )
        record["start"] = {side: _start(run, side) for side in run.sides}
        record["identical"] = _compare(run)
        record["rounds"] = _take_turns(run, scripts)
    record["further_simulator"] = None
    if options.memory:
        text = f"vlactl: memory of {count(1 + FURTHER, 'simulator')} of one task"
        with phase(say, text, forecast.growth(1 + FURTHER)):
            record["further_simulator"] = _grow(setup, variables)
    record |= _summarize(record)
    return BenchReport(
        header=HEADER,
        rows=make_rows(record),
        notes=make_notes(record),
        record=record,
        steps_per_second=record[OURS]["steps_per_second"],
    )


def _foresee(setup: Setup, options: BenchOptions, scripts: Sequence[Script]) -> Forecast:
    hands = lend(deal(scripts, setup.tasks)) if scripts else []
    lengths = [min(len(script.actions_TA), options.horizon) for hand in hands for script in hand]
    return Forecast(
        sides=expected.costs(
            gpu=draws_on_gpu(setup.config, setup.device_index),
            num_cameras=len(setup.cameras),
            chunk_length=setup.chunk_length,
            wait_steps=setup.config.wait_steps,
        ),
        num_simulators=len(setup.tasks),
        mean_length=mean(lengths) if lengths else None,
        options=options,
    )


def _describe(setup: Setup, forecast: Forecast, variables: Mapping[str, str]) -> Record:
    config, options = setup.config, forecast.options
    tasks = suite_tasks(config.full_suite)
    context = EnvContext(
        num_slots=len(setup.tasks), cameras=setup.cameras, device_index=setup.device_index
    )
    return {
        "config": config.model_dump(mode="json"),
        "options": asdict(options),
        "tasks": [tasks[task].name for task in setup.tasks],
        "num_processes": {STOCK: len(setup.tasks), OURS: num_processes(config, context)},
        "renderer": variables["MUJOCO_GL"] if options.cameras else "none",
        "expected": expected.ratios(forecast.sides, options.horizon, forecast.mean_length),
        "versions": {
            requirement.distribution: metadata.version(requirement.distribution)
            for requirement in PLUGIN.requirements
        },
    }


def _warm_up(setup: Setup, variables: Mapping[str, str], forecast: Forecast, say: Say) -> None:
    """Have each side's functions compiled: numba keeps them for the processes that are measured.

    Stock LIBERO has none that draw.
    """
    setup = replace(setup, tasks=setup.tasks[:1])
    text = "compiling functions (a minute more where this has never been done)"
    with phase(say, text, forecast.warm_up()):
        for each in (replace(setup, side=STOCK, cameras=()), setup):
            with Contender(each, variables) as contender:
                contender.call("reset", 0)
                contender.call("check")


def _start(run: Bench, side: str) -> Record:
    """Bring a side to life: seconds to the first observations, and what it weighs then."""
    text = f"{LABELS[side]}: building {count(len(run.tasks), 'simulator')}"
    with phase(run.say, text, run.forecast.build(side)):
        gpu_before, start = used_gpu_memory(), perf_counter()
        run.sides[side].call("reset", 0)
        seconds = perf_counter() - start
    return {
        "seconds": seconds,
        "memory": asdict(run.sides[side].memory()),
        "gpu_bytes": _growth_of_gpu_memory(gpu_before),
    }


def _growth_of_gpu_memory(before: int | None) -> int | None:
    after = used_gpu_memory()
    return None if before is None or after is None else after - before


def _compare(run: Bench) -> Record:
    """Whether both sides compute the same: states and pictures after the first actions."""
    run.say(f"same {CHECK_STEPS} actions on both sides")
    seen: dict[str, list[Seen | None]] = {n: side.call("check") for n, side in run.sides.items()}
    pairs = [(s, o) for s, o in zip(seen[STOCK], seen[OURS], strict=True) if s and o]
    return {
        "steps": CHECK_STEPS,
        "simulators": len(pairs),
        "states": sum(s.state == o.state for s, o in pairs),
        "pictures": sum(s.pictures == o.pictures for s, o in pairs),
    }


def _take_turns(run: Bench, scripts: Sequence[Script]) -> dict[str, list[Record]]:
    """Reset, step and play scripts on each side in every round; who begins changes."""
    rounds: dict[str, list[Record]] = {side: [] for side in run.sides}
    for number in range(run.options.rounds):
        order = list(run.sides)[:: -1 if number % 2 else 1]
        for side in order:
            text = f"round {number + 1} of {run.options.rounds}, {LABELS[side]}"
            with phase(run.say, text, run.forecast.turn(side)) as findings:
                result = _take_turn(run, side, number % run.num_trials, scripts)
                findings += _tell(result)
            rounds[side].append(result)
    return rounds


def _take_turn(run: Bench, side: str, trial: int, scripts: Sequence[Script]) -> Record:
    reset_seconds = run.sides[side].call("reset", trial)
    steps, seconds = run.sides[side].call("run", run.options.seconds)
    result = {"reset_seconds": reset_seconds, "steps": steps, "seconds": seconds}
    if scripts:
        result["episodes"] = _replay(run, side, deal(scripts, run.tasks))
    return result


def _tell(result: Record) -> Iterator[str]:
    yield f"reset {three_digits(result['reset_seconds'])} s"
    yield f"{three_digits(result['steps'] / result['seconds'])} steps/s"
    if "episodes" in result:
        cut = " (extrapolated)" * result["episodes"]["extrapolated"]
        yield f"{three_digits(result['episodes']['episodes_per_hour'])} episodes/h{cut}"


def _replay(run: Bench, side: str, hands: list[list[Script]]) -> Record:
    """Scripted episodes: a wave in lock-step to the horizon, or a queue over the slots."""
    options = run.options
    if side == STOCK:
        first = [hand[0] if hand else None for hand in hands]
        played: Played = run.sides[side].call(
            "play_wave", first, options.horizon, options.wave_seconds
        )
        extrapolated = played.steps < options.horizon
        total = played.reset_seconds + played.seconds * options.horizon / played.steps
    else:
        played = run.sides[side].call("play_queue", lend(hands), options.episodes, options.horizon)
        extrapolated, total = False, played.seconds
    return {
        **asdict(played),
        "extrapolated": extrapolated,
        "episodes_per_hour": 3600 * played.episodes / total,
    }


def _grow(setup: Setup, variables: Mapping[str, str]) -> Record:
    """What a further simulator of the same task costs, without and with pictures."""
    together = setup.config.model_copy(update={"slots_per_process": 1 + FURTHER})
    setup = replace(setup, config=together, tasks=setup.tasks[:1] * (1 + FURTHER))
    grown = {"physics": replace(setup, cameras=())}
    if setup.cameras:
        grown["pictures"] = setup
    return {name: _weigh_further(each, variables) for name, each in grown.items()}


def _weigh_further(setup: Setup, variables: Mapping[str, str]) -> Record:
    with Contender(setup, variables) as contender:
        contender.call("warm", [0])
        before, gpu_before = contender.memory(), used_gpu_memory()
        contender.call("warm", list(range(1, 1 + FURTHER)))
        gpu_bytes, after = _growth_of_gpu_memory(gpu_before), contender.memory()
    return {
        "pss_bytes": (after.pss - before.pss) / FURTHER,
        "gpu_bytes": None if gpu_bytes is None else gpu_bytes / FURTHER,
        "first_pss_bytes": before.pss,
        "processes": after.num_processes - before.num_processes,
    }


def _summarize(record: Record) -> Record:
    """Medians per side, and ratios of the two halves of each round."""
    samples = {side: _samples(rounds) for side, rounds in record["rounds"].items()}
    stock, ours = samples[STOCK], samples[OURS]
    ratio_samples = {
        "steps_per_second": _quotients(ours["steps_per_second"], stock["steps_per_second"]),
        "reset": _quotients(stock["reset_seconds"], ours["reset_seconds"]),
        "episodes_per_hour": _quotients(ours["episodes_per_hour"], stock["episodes_per_hour"]),
    }
    medians = {side: {**_medians(samples[side]), "samples": samples[side]} for side in samples}
    return {**medians, "ratios": _medians(ratio_samples), "ratio_samples": ratio_samples}


def _samples(rounds: Sequence[Record]) -> dict[str, list[float]]:
    episodes = [result["episodes"] for result in rounds if "episodes" in result]
    return {
        "steps_per_second": [result["steps"] / result["seconds"] for result in rounds],
        "reset_seconds": [result["reset_seconds"] for result in rounds],
        "episodes_per_hour": [played["episodes_per_hour"] for played in episodes],
    }


def _medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    return {name: median(values) if values else None for name, values in samples.items()}


def _quotients(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(upper, lower, strict=True)]
