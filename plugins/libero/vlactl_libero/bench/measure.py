"""The benchmark: who plays when, and what is made of the times.

The contenders take turns, so that a noisy machine hurts them alike, and a ratio compares the two
halves of one round. Their simulators live side by side, but only one side works at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from statistics import median
from time import perf_counter
from typing import Any

from vlactl.api.contracts import EnvContext
from vlactl.api.plugins import BenchOptions, BenchReport
from vlactl_libero.bench.contender import Contender
from vlactl_libero.bench.memory import used_gpu_memory
from vlactl_libero.bench.table import HEADER, make_notes, make_rows, predict
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
from vlactl_libero.environment import make_environment, simulator_variables
from vlactl_libero.plugin import PLUGIN, LiberoConfig
from vlactl_libero.scripted import FIXTURE_SEED
from vlactl_libero.tasks import make_spec, suite_tasks

STOCK, OURS = "stock", "ours"
PLAYED_WITH = {
    "fixture_poses": "fixed",
    "fixture_seed": FIXTURE_SEED,
    "ignore_terminations": False,
}
"""As scripted episodes were recorded, and the same on both sides."""
FURTHER = 4
"""Simulators that join one of the same task and process, to see what they add."""
Say = Callable[[str], None]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The two contenders, ready to play, and how they are asked to."""

    sides: Mapping[str, Contender]
    tasks: tuple[int, ...]
    num_trials: int
    options: BenchOptions
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
    record = _describe(setup, options, variables)
    with (
        closing(Contender(replace(setup, side=STOCK), variables)) as stock,
        closing(Contender(setup, variables)) as ours,
    ):
        run = Bench(
            sides={STOCK: stock, OURS: ours},
            tasks=setup.tasks,
            num_trials=min(task.num_trials for task in make_spec(config).tasks),
            options=options,
            say=say,
        )
        record["start"] = {side: _start(run, side) for side in run.sides}
        record["identical"] = _compare(run)
        record["rounds"] = _take_turns(run, scripts)
    record["further_simulator"] = _grow(setup, variables, say) if options.memory else None
    record |= _summarize(record)
    return BenchReport(
        header=HEADER, rows=make_rows(record), notes=make_notes(record), record=record
    )


def _describe(setup: Setup, options: BenchOptions, variables: Mapping[str, str]) -> Record:
    tasks = suite_tasks(setup.config.full_suite)
    return {
        "config": setup.config.model_dump(mode="json"),
        "options": asdict(options),
        "tasks": [tasks[task].name for task in setup.tasks],
        "renderer": variables["MUJOCO_GL"] if options.cameras else "none",
        "predicted": predict(len(options.cameras), variables["MUJOCO_GL"]),
        "versions": {
            requirement.distribution: metadata.version(requirement.distribution)
            for requirement in PLUGIN.requirements
        },
    }


def _start(run: Bench, side: str) -> Record:
    """Bring a side to life: seconds to the first observations, and what it weighs then."""
    run.say(f"{side}: building {len(run.tasks)} simulators")
    gpu_before, start = used_gpu_memory(), perf_counter()
    run.sides[side].call("reset", 0)
    return {
        "seconds": perf_counter() - start,
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
            reset_seconds = run.sides[side].call("reset", number % run.num_trials)
            steps, seconds = run.sides[side].call("run", run.options.seconds)
            run.say(
                f"round {number + 1} of {run.options.rounds}, {side}: reset {reset_seconds:.3g} s,"
                f" {steps / seconds:.4g} steps/s"
            )
            result = {"reset_seconds": reset_seconds, "steps": steps, "seconds": seconds}
            if scripts:
                result["episodes"] = _replay(run, side, deal(scripts, run.tasks))
            rounds[side].append(result)
    return rounds


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
    rate = 3600 * played.episodes / total
    cut = f", {played.steps} of {options.horizon} steps measured" * extrapolated
    run.say(f"{side}: {rate:.4g} episodes/h{cut}")
    return {**asdict(played), "extrapolated": extrapolated, "episodes_per_hour": rate}


def _grow(setup: Setup, variables: Mapping[str, str], say: Say) -> Record:
    """What a further simulator of the same task costs, without and with pictures."""
    say("ours: memory of further simulators of a task")
    together = setup.config.model_copy(update={"slots_per_process": 1 + FURTHER})
    setup = replace(setup, config=together, tasks=setup.tasks[:1] * (1 + FURTHER))
    grown = {"physics": replace(setup, cameras=())}
    if setup.cameras:
        grown["pictures"] = setup
    return {name: _weigh_further(each, variables) for name, each in grown.items()}


def _weigh_further(setup: Setup, variables: Mapping[str, str]) -> Record:
    with closing(Contender(setup, variables)) as contender:
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
