"""How a benchmark's record is shown: a table of the two sides, and what explains it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

HEADER = ("", "stock", "vlactl", "ratio", "predicted")
MIB = 2**20
PREDICTION = (
    "per control step stock runs 75 forward passes and draws a picture per camera; vlactl runs 25 "
    "and draws once per chunk; a reset compiles the scene there and restores it here"
)


def predict(num_cameras: int, renderer: str) -> dict[str, float]:
    """Ratios expected before measuring, with 8 actions per chunk."""
    many_pictures = num_cameras > 1 and renderer == "egl"
    steps = 8.0 if many_pictures else 6.0
    return {
        "steps_per_second": steps if num_cameras else 4.0,
        "reset": 20.0,
        "episodes_per_hour": 15.0,
    }


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
    return (*_workload(record), *_equality(record), *_explanation(record))


def _row(record: dict[str, Any], label: str, key: str, ratio: str) -> tuple[str, ...]:
    sides = [record[side]["samples"][key] for side in ("stock", "ours")]
    quotients = record["ratio_samples"][ratio]
    predicted = f">= {record['predicted'][ratio]:g}"
    return (label, *map(_spread, [*sides, quotients]), predicted)


def _starts(record: dict[str, Any]) -> list[tuple[str, ...]]:
    stock, ours = (record["start"][side] for side in ("stock", "ours"))
    number = len(record["tasks"])
    weights = [side["memory"]["pss"] / number / MIB for side in (stock, ours)]
    rows: list[tuple[str, ...]] = [
        ("first build, s", *_pair(stock["seconds"], ours["seconds"])),
        ("memory per simulator, MiB", *_pair(*weights)),
    ]
    if None not in (stock["gpu_bytes"], ours["gpu_bytes"]):
        gpu = [side["gpu_bytes"] / number / MIB for side in (stock, ours)]
        rows.append(("GPU memory per simulator, MiB", *_pair(*gpu)))
    return rows


def _further(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Without a stock column: a stock simulator shares nothing with another."""
    rows: list[tuple[str, ...]] = []
    for name, found in (record["further_simulator"] or {}).items():
        gpu = found["gpu_bytes"]
        text = _number(found["pss_bytes"] / MIB)
        text += "" if gpu is None or name == "physics" else f", GPU {_number(gpu / MIB)}"
        rows.append((f"a further one of a task, {name}, MiB", "", text))
    return rows


def _workload(record: dict[str, Any]) -> list[str]:
    config, options = record["config"], record["options"]
    suite = " ".join(filter(None, [config["suite"], config["perturbation"]]))
    size, number = config["image_size"], len(record["tasks"])
    cameras = f"{len(options['cameras'])} cameras of {size} px ({record['renderer']})"
    cameras = cameras if options["cameras"] else "no cameras"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"{number} simulators, {len(set(record['tasks']))} tasks of {suite}, {cameras}, "
        f"chunks of {options['chunk_length']}; {versions}",
        f"medians (least - most) of {options['rounds']} rounds of {options['seconds']:g} s; ratios "
        "within each round",
        "stock: SubprocVectorEnv in lock-step, pictures at every step; its reset rebuilds all "
        f"scenes at once; both resets include {config['wait_steps']} steps of settling",
        f"expected because {PREDICTION}",
    ]


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
    stock, ours = (record["rounds"][side][-1]["episodes"] for side in ("stock", "ours"))
    horizon, length = record["options"]["horizon"], ours["steps"] / ours["episodes"]
    lines = [
        f"episodes: {ours['successes']} of {ours['episodes']} succeed; lock-step plays "
        f"{horizon} steps where the queue plays {length:.0f}: {horizon / length:.1f} x fewer"
    ]
    if stock["extrapolated"]:
        lines.append(
            f"stock's episodes/h is extrapolated: a wave was cut after {stock['steps']} of "
            f"{horizon} steps in {stock['seconds']:.1f} s"
        )
    return lines


def _pair(stock: float, ours: float) -> tuple[str, str, str]:
    return _number(stock), _number(ours), _number(stock / ours) if ours > 0 else "-"


def _spread(values: Sequence[float]) -> str:
    middle = _number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values))} - {_number(max(values))})"


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
