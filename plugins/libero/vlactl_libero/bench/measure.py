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
        record["rounds"] = _take_turns(run)
        record["episodes"] = _replay(run, scripts) if scripts else None
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


def _take_turns(run: Bench) -> dict[str, list[Record]]:
    """Reset and step each side in every round; who begins changes."""
    rounds: dict[str, list[Record]] = {side: [] for side in run.sides}
    for number in range(run.options.rounds):
        order = list(run.sides)[:: -1 if number % 2 else 1]
        for side in order:
            reset_seconds = run.sides[side].call("reset", number % run.num_trials)
            steps, seconds = run.sides[side].call("run", run.options.seconds)
            rounds[side].append(
                {"reset_seconds": reset_seconds, "steps": steps, "seconds": seconds}
            )
            run.say(
                f"round {number + 1} of {run.options.rounds}, {side}: reset {reset_seconds:.3g} s,"
                f" {steps / seconds:.4g} steps/s"
            )
    return rounds


def _replay(run: Bench, scripts: Sequence[Script]) -> Record:
    """Scripted episodes: a wave in lock-step, and a queue over the slots."""
    options, hands = run.options, deal(scripts, run.tasks)
    run.say(f"stock: one wave of {len(hands)} scripted episodes in lock-step")
    wave: Played = run.sides[STOCK].call(
        "play_wave",
        [hand[0] if hand else None for hand in hands],
        options.horizon,
        options.wave_seconds,
    )
    run.say(f"ours: a queue of {options.episodes} scripted episodes")
    queue: Played = run.sides[OURS].call(
        "play_queue", lend(hands), options.episodes, options.horizon
    )
    wave_seconds = wave.reset_seconds + wave.seconds * options.horizon / wave.steps
    return {
        STOCK: {
            **asdict(wave),
            "extrapolated": wave.steps < options.horizon,
            "wave_seconds": wave_seconds,
            "episodes_per_hour": 3600 * wave.episodes / wave_seconds,
        },
        OURS: {
            **asdict(queue),
            "extrapolated": False,
            "episodes_per_hour": 3600 * queue.episodes / queue.seconds,
        },
    }


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
    rounds = record["rounds"]
    speeds = {side: [r["steps"] / r["seconds"] for r in rounds[side]] for side in rounds}
    resets = {side: [r["reset_seconds"] for r in rounds[side]] for side in rounds}
    samples = {
        "steps_per_second": _quotients(speeds[OURS], speeds[STOCK]),
        "reset": _quotients(resets[STOCK], resets[OURS]),
    }
    ratios: Record = {name: median(values) for name, values in samples.items()}
    episodes = record["episodes"]
    ratios["episodes_per_hour"] = (
        episodes and episodes[OURS]["episodes_per_hour"] / episodes[STOCK]["episodes_per_hour"]
    )
    summary = {
        side: {
            "steps_per_second": median(speeds[side]),
            "reset_seconds": median(resets[side]),
            "episodes_per_hour": episodes and episodes[side]["episodes_per_hour"],
            "samples": {"steps_per_second": speeds[side], "reset_seconds": resets[side]},
        }
        for side in rounds
    }
    return {**summary, "ratios": ratios, "ratio_samples": samples}


def _quotients(upper: Sequence[float], lower: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(upper, lower, strict=True)]
