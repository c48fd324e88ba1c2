"""How a benchmark's record is shown: a table of the two sides, and what explains it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from vlactl_libero.bench.progress import count

HEADER = ("", "stock", "vlactl", "ratio", "expected")
MIB = 2**20
REASONS = (
    "per control step stock runs 75 forward passes and draws a picture per camera; vlactl runs 25 "
    "and draws once per chunk; a reset compiles the scene there and restores it here"
)


def make_rows(record: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
    """One row per quantity: median (least to most over the rounds) of both sides, and the ratio."""
    rows = [
        _row(record, "steps/s", "steps_per_second", "steps_per_second"),
        _row(record, "reset, s", "reset_seconds", "reset"),
    ]
    if record["ratio_samples"]["episodes_per_hour"]:
        rows.append(_row(record, "episodes/h", "episodes_per_hour", "episodes_per_hour"))
    return (*rows, *_starts(record), *_further(record))


def make_notes(record: dict[str, Any]) -> tuple[str, ...]:
    """What the table means: the workload, the proof of equality, and the parts of the ratios."""
    return (
        *_workload(record),
        *_sharing(record),
        *_equality(record),
        *_explanation(record),
    )


def _row(record: dict[str, Any], label: str, key: str, ratio: str) -> tuple[str, ...]:
    stock, ours = (_spread(record[side]["samples"][key]) for side in ("stock", "ours"))
    if key == "episodes_per_hour" and _cut_waves(record):
        stock += ", extrapolated"
    expected = float(f"{record['expected'][ratio]:.2g}")
    return (label, stock, ours, _spread(record["ratio_samples"][ratio]), f"about {expected:g}")


def _cut_waves(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Of lock-step, those whose end is extrapolated."""
    waves = [turn["episodes"] for turn in record["rounds"]["stock"]]
    return [wave for wave in waves if wave["extrapolated"]]


def _starts(record: dict[str, Any]) -> list[tuple[str, ...]]:
    stock, ours = (record["start"][side] for side in ("stock", "ours"))
    seconds = _pair(stock["seconds"], ours["seconds"])
    weight, our_weight, ratio = _pair(*(_memory(record, side) for side in ("stock", "ours")))
    processes = count(record["num_processes"]["ours"], "process")
    tasks = count(len(set(record["tasks"])), "task")
    rows: list[tuple[str, ...]] = [
        ("first build, s", *seconds),
        (
            "memory per simulator, MiB",
            f"{weight} (nothing shared)",
            f"{our_weight} ({processes}, {tasks})",
            ratio,
        ),
    ]
    if None not in (stock["gpu_bytes"], ours["gpu_bytes"]):
        number = len(record["tasks"])
        gpu = [side["gpu_bytes"] / number / MIB for side in (stock, ours)]
        rows.append(("GPU memory per simulator, MiB", *_pair(*gpu)))
    return rows


def _memory(record: dict[str, Any], side: str) -> float:
    """MiB per simulator."""
    return float(record["start"][side]["memory"]["pss"] / len(record["tasks"]) / MIB)


def _further(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Next to what any stock simulator takes; it draws where the benchmark does."""
    stock = three_digits(_memory(record, "stock"))
    rows: list[tuple[str, ...]] = []
    for name, found in (record["further_simulator"] or {}).items():
        gpu = found["gpu_bytes"]
        text = three_digits(found["pss_bytes"] / MIB)
        text += "" if gpu is None or name == "physics" else f", GPU {three_digits(gpu / MIB)}"
        differs = name == "physics" and record["options"]["cameras"]
        theirs = f"{stock} (with pictures)" if differs else stock
        label = "with pictures" if name == "pictures" else "physics only"
        rows.append((f"one more of a task, {label}, MiB", theirs, text))
    return rows


def _workload(record: dict[str, Any]) -> list[str]:
    config, options = record["config"], record["options"]
    suite = " ".join(filter(None, [config["suite"], config["perturbation"]]))
    size, number = config["image_size"], len(record["tasks"])
    cameras = f"{count(len(options['cameras']), 'camera')} of {size} px ({record['renderer']})"
    cameras = cameras if options["cameras"] else "no cameras"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"{count(number, 'simulator')}, {count(len(set(record['tasks'])), 'task')} of {suite}, "
        f"{cameras}, chunks of {options['chunk_length']}; {versions}",
        f"medians (least - most) of {count(options['rounds'], 'round')} of "
        f"{options['seconds']:g} s; ratios within each round",
        "stock: SubprocVectorEnv in lock-step, pictures at every step; its reset rebuilds all "
        f"scenes at once; both resets include {config['wait_steps']} steps of settling",
        f"expected, from the cost of single parts on other machines, because {REASONS}",
        "first build: Python and its imports, scenes and the first reset; numba has compiled its "
        "functions before",
    ]


def _sharing(record: dict[str, Any]) -> list[str]:
    """What the memory of a simulator depends on."""
    lines = [
        "memory: all processes of a side, shared pages counted once, per simulator; every stock "
        "simulator has a process and a model of its own, vlactl's share processes and, where they "
        "play the same task there, its model"
    ]
    if record["further_simulator"]:
        lines.append(
            "one more of a task: what a simulator adds to a process that plays this task already"
        )
    return lines


def _equality(record: dict[str, Any]) -> list[str]:
    found = record["identical"]
    total = found["simulators"]
    pictures = f" and {found['pictures']} of {total} sets of pictures" * (
        record["renderer"] != "none"
    )
    return [
        f"after the same {found['steps']} actions {found['states']} of {total} states{pictures} "
        "are equal bit for bit"
    ]


def _explanation(record: dict[str, Any]) -> list[str]:
    if not record["ratio_samples"]["episodes_per_hour"]:
        return []
    turns = [turn["episodes"] for turn in record["rounds"]["ours"]]
    episodes, successes, steps = (
        sum(turn[key] for turn in turns) for key in ("episodes", "successes", "steps")
    )
    lines = [
        f"scripted episodes: {successes} of {episodes} of vlactl succeed",
        _factors(record, steps / episodes),
    ]
    lines += [
        f"stock's episodes/h is extrapolated: a wave was cut after {wave['steps']} of "
        f"{record['options']['horizon']} steps in {wave['seconds']:.1f} s"
        for wave in _cut_waves(record)[-1:]
    ]
    return lines


def _factors(record: dict[str, Any], mean_length: float) -> str:
    ratios, horizon = record["ratios"], record["options"]["horizon"]
    speed, whole = ratios["steps_per_second"], ratios["episodes_per_hour"]
    fewer = horizon / mean_length
    rest = whole / speed / fewer
    return (
        f"ratio of episodes/h: {three_digits(whole)} = {three_digits(speed)} (steps/s) x "
        f"{three_digits(fewer)} (lock-step plays all {horizon} steps, the queue {mean_length:.0f} "
        f"to success) x {three_digits(rest)} (the rest: resets, waiting, other motions)"
    )


def _pair(stock: float, ours: float) -> tuple[str, str, str]:
    return three_digits(stock), three_digits(ours), three_digits(stock / ours) if ours > 0 else "-"


def _spread(values: Sequence[float]) -> str:
    middle = three_digits(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({three_digits(min(values))} - {three_digits(max(values))})"


def three_digits(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
