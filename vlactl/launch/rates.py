"""How fast a machine simulates, infers and updates: measured by `vlactl bench`, kept in a file.

    ~/.cache/vlactl/rates.json      VLACTL_HOME takes the place of ~/.cache/vlactl

Simulators are known by device and environment; policies by device and size, since what a policy
costs depends on its size and not on where its weights came from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vlactl.api.plugins import Footprint
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError
from vlactl.hub import models
from vlactl.report.atomic import write_json

FILE_NAME = "rates.json"
Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the work of a step costs.

    Attributes:
        simulator: control steps per second of one simulator that has a core of its own.
        inference: seconds of a call, per row of its batch.
        update: seconds of forward and backward pass, per sample.
        optimizer: seconds of an optimizer step, per trained parameter of a rank.
        copy: bytes per second between a device and pinned host memory.
        within: bytes per second that each device exchanges with others of its machine.
        between: the same, between machines.
        source: where the numbers are from, for a person.
    """

    simulator: float
    inference: float
    update: float
    optimizer: float
    copy: float = 54.9e9
    within: float = 300e9
    between: float = 50e9
    source: str = ""


PUBLISHED = Rates(
    simulator=1329 / 16,
    inference=0.0106,
    update=0.0517,
    optimizer=28 / 3e12,
    source="published for OpenVLA-OFT-7B on one H100 with 16 cores: 1329 control steps/s of 16 "
    "simulators, 10.6 ms per observation (batch 32), 51.7 ms per sample (LoRA, all layers "
    "recomputed); AdamW moves 28 bytes per parameter at 3 TB/s",
)
PUBLISHED_UPDATE_UNRECOMPUTED = 0.0377


def published(config: RunConfig) -> Rates:
    """The published rates, for the configured recomputation."""
    if config.train.activation_checkpointing == "full":
        return PUBLISHED
    text = PUBLISHED.source.replace("51.7", "37.7").replace("all layers recomputed", "no layer is")
    return replace(PUBLISHED, update=PUBLISHED_UPDATE_UNRECOMPUTED, source=text)


def environment_key(device: str, config: RunConfig | str) -> str:
    """Of the record of an environment's simulators."""
    name = config if isinstance(config, str) else config.env.name
    return f"{device} / {name}"


def model_key(device: str, config: RunConfig, footprint: Footprint) -> str:
    """Of the record of a policy; the footprint is that without recomputation."""
    parts = {**asdict(footprint), "dtype": config.train.dtype}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{device} / {config.model.name} / {digest}"


def store(kind: str, key: str, record: Record) -> Path:
    """Remember what was measured; newer records replace older ones.

    Raises:
        ConfigError: this user has no place for it.
    """
    path = _file()
    known = _read(path)
    known.setdefault(kind, {})[key] = record
    write_json(path, known)
    return path


def measured(device: str, model: str, config: RunConfig, rows: int) -> Rates | list[str]:
    """The rates of this machine, or the commands that would measure what is missing.

    Args:
        device: what ranks compute on.
        model: key of the policy's record.
        config: of the run.
        rows: of an inference call.
    """
    known: Record = {}
    with suppress(ConfigError):
        known = _read(_file())
    simulators = known.get("env", {}).get(environment_key(device, config))
    policy = known.get("model", {}).get(model)
    recomputation = config.train.activation_checkpointing
    missing = [] if simulators else ["vlactl bench env"]
    if not policy or recomputation not in policy["update"]:
        missing.append("vlactl bench model --preset ...")
    if missing:
        return missing
    return _combine(device, simulators, policy, rows, recomputation)


def _combine(
    device: str, simulators: Record, policy: Record, rows: int, recomputation: str
) -> Rates:
    calls: Mapping[str, float] = policy["inference"]
    nearest = min(calls, key=lambda size: abs(math.log(int(size) / rows)))
    update = policy["update"][recomputation]
    source = (
        f"measured on {device}: {simulators['simulators']} simulators "
        f"({simulators['measured']}), inference in batches of {nearest}, updates in batches of "
        f"{update['samples']} ({policy['measured']})"
    )
    rates = Rates(
        simulator=simulators["steps_per_second"] / simulators["simulators"],
        inference=calls[nearest],
        update=update["seconds_per_sample"],
        optimizer=policy["optimizer_seconds_per_parameter"] or PUBLISHED.optimizer,
        source=source,
    )
    copy = policy.get("copy_bytes_per_second")
    return replace(rates, copy=copy) if copy else rates


def _file() -> Path:
    return models.home().parent / FILE_NAME


def _read(path: Path) -> Record:
    """All records; a damaged file counts as none, the next benchmark replaces it."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
