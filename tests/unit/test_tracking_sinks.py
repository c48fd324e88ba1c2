"""Weights & Biases, SwanLab and Trackio, the real libraries, each without a network.

They hold other libraries back (see the extras in pyproject.toml), so they are not among the
developer's: `nox -s sinks` installs them and runs this file. What a library has stored is read
back with its own message types.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from vlactl.api.plugins import SinkPlugin
from vlactl.api.registry import find
from vlactl.report.identity import identify

KEY = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline"}
CONFIG = {"run_name": "toy", "optim": {"lr": 0.02}}
MIRROR = """
import logging, math, sys
from pathlib import Path
from vlactl.report.sinks import MetricsLog

logging.basicConfig(level=logging.INFO)
run, sink, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
log = MetricsLog(run, [sink])
log.resume_from(first)
for step in range(first, last):
    log.log(step, {"train/kl": step / 4, "train/odd": math.nan if step == 1 else 1.0})
    log.log(step, {"eval/success": 0.5})
log.close()
"""


def installed(*names: str) -> list[Any]:
    """Parameters that are skipped, with the reason, where a library is not there."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                find_spec(name) is None, reason=f"{name} is not installed: nox -s sinks"
            ),
        )
        for name in names
    ]


every_sink = pytest.mark.parametrize("sink", installed("wandb", "swanlab", "trackio"))
every_service = pytest.mark.parametrize("sink", installed("wandb", "swanlab"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "toy" / "2026-01-01T00-00-00"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def mirror(run: Path, sink: str, first: int, last: int, **variables: str) -> str:
    """Log some steps in a process of their own, as a worker does; returns what it says."""
    home = run.parents[2] / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    program = [sys.executable, "-c", MIRROR, run, sink, first, last]
    done = subprocess.run(
        [str(word) for word in program],
        env={**kept, "HOME": str(home), "TRACKIO_DIR": str(home / "trackio"), **variables},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


# --------------------------------------------------------------------------------------------
# What a library has stored: (id or name, configuration, step -> metrics) of every start
# --------------------------------------------------------------------------------------------
Stored = tuple[str, dict[str, Any], dict[int, dict[str, float]]]


def stored(run: Path, sink: str) -> list[Stored]:
    return {"wandb": wandb_starts, "swanlab": swanlab_starts, "trackio": trackio_runs}[sink](run)


def records(path: Path) -> Iterator[bytes]:
    """Messages of a log in LevelDB's format, which both services use, behind 7 bytes of theirs."""
    content, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def wandb_starts(run: Path) -> list[Stored]:
    from wandb.proto import wandb_internal_pb2

    starts = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        name, config, steps = "", {}, {}
        for message in records(path):
            record = wandb_internal_pb2.Record.FromString(message)
            if record.WhichOneof("record_type") == "run":
                name = record.run.run_id
                config = {e.key: json.loads(e.value_json) for e in record.run.config.update}
            if record.WhichOneof("record_type") == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                steps[record.history.step.num] = values
        starts.append((name, config, steps))
    return starts


def swanlab_starts(run: Path) -> list[Stored]:
    import yaml
    from swanlab.proto.swanlab.record.v1 import record_pb2

    starts = []
    for path in sorted(run.glob("swanlab/run-*/run-*.swanlab")):
        steps: dict[int, dict[str, float]] = {}
        for message in records(path):
            record = record_pb2.Record.FromString(message)
            if record.HasField("scalar") and not record.scalar.key.startswith("__"):
                values = steps.setdefault(record.scalar.step, {})
                values[record.scalar.key] = record.scalar.value.number
        config = yaml.safe_load((path.parent / "files" / "config.yaml").read_text())
        values = {key: entry["value"] for key, entry in config.items()}
        starts.append((path.stem.removeprefix("run-"), values, steps))
    return starts


def trackio_runs(run: Path) -> list[Stored]:
    program = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([
    [each.name, each.config, SQLiteStorage.get_logs("vlactl", each.name)]
    for each in trackio.Api().runs("vlactl")
]))
"""
    database = run.parents[2] / "home" / "trackio"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRACKIO_DIR": str(database)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = []
    for name, config, lines in json.loads(done.stdout.splitlines()[-1]):
        steps: dict[int, dict[str, float]] = {}
        for line in lines:
            steps.setdefault(line["step"], {}).update(line)
        found.append((name, config, steps))
    return found


# --------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------
@every_sink
def test_a_resumed_run_is_the_same_run(run, sink):
    mirror(run, sink, 0, 3, **OFFLINE)
    moved = run.with_name("2026-01-02T00-00-00")
    identity = identify(run)
    if sink != "trackio":  # which knows runs by name
        run = run.rename(moved)
    mirror(run, sink, 2, 5, **OFFLINE)  # step 2 is played again
    starts = stored(run, sink)
    expected_name = f"{identity.name}-{identity.id[:6]}" if sink == "trackio" else identity.id
    assert {name for name, _, _ in starts} == {expected_name}
    steps: dict[int, dict[str, float]] = {}
    for _, config, of_start in starts:
        assert config["optim"] == {"lr": 0.02}
        for step, values in of_start.items():
            steps.setdefault(step, {}).update(values)
    assert sorted(steps) == [0, 1, 2, 3, 4]
    for step, values in steps.items():
        assert values["train/kl"] == step / 4
        assert values["eval/success"] == 0.5
    assert not math.isfinite(float(steps[1].get("train/odd") or math.nan))


@every_sink
def test_the_record_is_complete_and_tells_no_secret(run, sink):
    said = mirror(run, sink, 0, 2, WANDB_API_KEY=KEY, SWANLAB_API_KEY=KEY, HF_TOKEN=KEY, **OFFLINE)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    assert KEY not in said
    written = [path for path in run.parents[2].rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


@every_service
def test_who_is_not_logged_in_is_told_and_not_asked(run, sink):
    said = mirror(run, sink, 0, 2)
    assert said.count(f'sink "{sink}" failed and the run goes on without it') == 1
    assert "API key" in said
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4


@every_sink
def test_nothing_is_logged_nothing_is_wrong(run, sink):
    assert "failed" not in mirror(run, sink, 0, 0, **OFFLINE)


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_sink_says_what_it_needs_before_it_is_there(name):
    plugin = find("sink", name)
    assert isinstance(plugin, SinkPlugin)
    (requirement,) = plugin.requirements
    assert requirement.distribution == name
    assert requirement.install == f'pip install "vlactl[{name}]"'


def test_an_identity_is_kept_and_its_own(run, tmp_path):
    first = identify(run)
    assert first.name == "toy-2026-01-01T00-00-00"
    assert first.config == CONFIG
    assert len(first.id) == 16
    assert identify(run) == first
    moved = run.rename(tmp_path / "elsewhere")
    assert identify(moved).id == first.id
    other = tmp_path / "other"
    other.mkdir()
    assert identify(other).id != first.id
    copy = Path(shutil.copytree(moved, tmp_path / "copy"))
    assert identify(copy).id == first.id
    (copy / "tracking.json").unlink()
    assert identify(copy).id != first.id
