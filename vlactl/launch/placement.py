"""Placement strings: which devices a role uses, and how its processes sit on them.

    "all"                every device, one process each
    "0-7"  "0-3,8"       ascending devices, one process each
    "0-1:0-3,3-5"        devices:processes - processes 0,1 on device 0 and 2,3 on device 1, then one
                         process each on 3, 4 and 5; "0-3:0-1" gives every process two devices

Processes are numbered from 0 without gaps. Where a part names no processes, the count goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from vlactl.errors import ConfigError

Processes = tuple[tuple[int, ...], ...]
"""Devices of each process of a role: entry i belongs to process i."""

_FORMS = 'write "all", devices like "0-7" or "0-3,8", or devices:processes like "0-1:0-3"'


def parse_placement(text: str, num_devices: int) -> Processes:
    """Devices of each process that a placement string names.

    Raises:
        ConfigError: not such a string, devices that do not exist, ranges that overlap or run
            backwards, processes that leave gaps, or counts of which neither divides the other.
    """
    processes: list[tuple[int, ...]] = []
    last_device = -1
    for part in text.split(","):
        devices_text, colon, ranks_text = (piece.strip() for piece in part.partition(":"))
        devices = _devices(devices_text, num_devices, text)
        if devices[0] <= last_device:
            raise _error(text, f'"{part}" overlaps or precedes the part before it')
        last_device = devices[-1]
        ranks = _range(ranks_text, text) if colon else None
        processes += _spread(devices, ranks, first_rank=len(processes), text=text)
    return tuple(processes)


def check_overlaps(devices_by_role: Mapping[str, Sequence[int]], visible: Sequence[int]) -> None:
    """Refuse two roles that share some devices while each also has devices of its own."""
    for (first, one), (second, two) in combinations(devices_by_role.items(), 2):
        ones, twos = set(one), set(two)
        if ones & twos and ones - twos and twos - ones:
            raise ConfigError(
                f"placement.{first} ({join_ranges(ones)}) and placement.{second} "
                f"({join_ranges(twos)}) overlap half-way, on {join_ranges(ones & twos)}",
                hint="give both the same devices, disjoint devices, or let one contain the other; "
                f"visible devices: {join_ranges(visible)}",
            )


def join_ranges(numbers: Sequence[int] | set[int]) -> str:
    """Numbers as short ranges: 0-3,8."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _devices(part: str, num_devices: int, text: str) -> range:
    devices = range(num_devices) if part == "all" else _range(part, text)
    if devices[-1] >= num_devices:
        visible = join_ranges(range(num_devices))
        raise _error(text, f'"{part}" is not there: visible devices are {visible}')
    return devices


def _range(part: str, text: str) -> range:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if not match:
        raise _error(text, f'"{part}" is neither a number nor a range')
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise _error(text, f'range "{part}" runs backwards')
    return range(first, last + 1)


def _spread(devices: range, ranks: range | None, *, first_rank: int, text: str) -> Processes:
    ranks = ranks if ranks is not None else range(first_rank, first_rank + len(devices))
    if ranks[0] != first_rank:
        raise _error(
            text,
            f"processes are numbered from 0 without gaps: {first_rank} comes here, not {ranks[0]}",
        )
    if len(ranks) % len(devices) == 0:
        share = len(ranks) // len(devices)
        return tuple((devices[i // share],) for i in range(len(ranks)))
    if len(devices) % len(ranks) == 0:
        share = len(devices) // len(ranks)
        return tuple(tuple(devices[i * share : (i + 1) * share]) for i in range(len(ranks)))
    raise _error(
        text, f"{len(ranks)} processes and {len(devices)} devices: neither divides the other"
    )


def _error(text: str, reason: str) -> ConfigError:
    return ConfigError(f'placement "{text}": {reason}', hint=_FORMS)
