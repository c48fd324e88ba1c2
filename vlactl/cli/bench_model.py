"""`vlactl bench model`: what inference and update of a policy cost on this machine."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlactl.cli.output import print_table, print_text
from vlactl.errors import ConfigError, TrainingError, UserError
from vlactl.launch.hardware import GIB
from vlactl.launch.processes import ProcessTree, process_tree

BENCH_MODULE = "vlactl.bench"
MEASURED = "measured.json"
LARGE_BATCH = 32
_LOG = "bench.log"
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
_PHASES = {
    "start": "starting",
    "build": "building the policy",
    "inference": "inference",
    "none": "update, all activations kept",
    "selective": "update, every second layer recomputed",
    "full": "update, all layers recomputed",
    "optimizer": "optimizer",
}


def bench_model(
    preset: Annotated[
        str, typer.Option("--preset", "-p", metavar="NAME", help="Preset name or .toml file.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of each measurement, at least.")] = 3.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything that was measured."),
    ] = None,
) -> None:
    """Measure inference and update of a preset's policy on one device, without simulators.

    Results are kept for the estimates of `vlactl train --dry-run`.
    """
    from vlactl.config.compose import compose
    from vlactl.hub.models import with_downloaded
    from vlactl.launch.hardware import detect
    from vlactl.launch.plan import inference_rows, policy_blockers, size_key
    from vlactl.launch.rates import store
    from vlactl.report.atomic import check_writable, write_json

    if json_file is not None:
        check_writable(json_file, "--json")
    config = with_downloaded(compose(preset, set_ or ()).config)
    if blockers := policy_blockers(config):
        raise ConfigError(f"this policy cannot be built:\n{chr(10).join(blockers)}")
    hardware = detect()
    planned = inference_rows(config)
    rows = {1, planned} | ({LARGE_BATCH} if hardware.gpus else set())
    record = _measure(config, sorted(rows), seconds)
    record["device"] = hardware.device_name
    where = store("model", size_key(config, hardware.device_name), record)
    if json_file is not None:
        write_json(json_file, {"command": ["vlactl", *sys.argv[1:]], **record})
    print_text(f" {hardware.device_name}\n")
    print_table(_inference_rows(record), ("inference", "ms per observation", "against batch 1"))
    print_text()
    print_table(_update_rows(record), ("recomputed", "ms per sample", "peak memory"))
    print_text()
    for note in _notes(record, planned, where):
        print_text(f" {note}")


def _measure(config: Any, rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Have a process with torch measure the policy.

    Raises:
        UserError: it could not.
    """
    from vlactl.config.compose import dump
    from vlactl.launch.rundir import CONFIG
    from vlactl.launch.status import SUPERVISOR_VARIABLE
    from vlactl.report.atomic import write_json

    with tempfile.TemporaryDirectory(prefix="vlactl-bench-") as folder:
        job = Path(folder)
        write_json(job / CONFIG, dump(config))
        command = [sys.executable, "-m", BENCH_MODULE, "--job-dir", str(job)]
        command += ["--rows", ",".join(map(str, rows)), "--seconds", str(seconds)]
        variables = {SUPERVISOR_VARIABLE: str(os.getpid())}
        with process_tree(command, variables, job / _LOG, grace=_GRACE_SECONDS) as tree:
            _follow(tree, job)
        if tree.exit_code() != 0:
            raise _failure(job, tree.exit_code())
        found: dict[str, Any] = json.loads((job / MEASURED).read_text())
        return found


def _follow(tree: ProcessTree, job: Path) -> None:
    """Tell the phases of the process until it ends."""
    from vlactl.launch.status import read_heartbeats

    phase = ""
    while tree.exit_code() is None:
        for beat in read_heartbeats(job):
            if beat.phase != phase:
                phase = beat.phase
                print_text(f" {_PHASES[phase]}", file=sys.stderr)
        time.sleep(_POLL_SECONDS)


def _failure(job: Path, exit_code: int | None) -> UserError:
    from vlactl.launch.status import read_failures

    for failure in read_failures(job):
        if error := failure.user_error():
            return error
        return TrainingError(f"the benchmark failed: {failure.kind}: {failure.message}")
    last = (job / _LOG).read_text(errors="replace").splitlines()[-1:]
    return TrainingError(f"the benchmark left with exit code {exit_code}", hint="".join(last))


def _inference_rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    calls = record["inference"]
    for rows, seconds in calls.items():
        yield f"batch {rows}", f"{1e3 * seconds:.3g}", f"{calls['1'] / seconds:.2f} x"


def _update_rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    words = {"none": "nothing", "selective": "every second layer", "full": "all layers"}
    for recomputation, word in words.items():
        found = record["update"].get(recomputation)
        if found is None:
            yield word, "does not fit", ""
            continue
        peak = found["peak_bytes"]
        memory = "not measured on CPUs" if peak is None else f"{peak / GIB:.1f} GiB"
        yield word, f"{1e3 * found['seconds_per_sample']:.3g}", memory


def _notes(record: dict[str, Any], planned: int, where: Path) -> Iterator[str]:
    updates = list(record["update"].values())
    yield f"inference: a run's calls have {planned} rows (rollout.batch_size)"
    yield "batch 1 is what one simulator at a time would cost, on the same network"
    if updates:
        samples = updates[0]["samples"]
        yield f"update: forward and backward pass of {samples} samples (optim.micro_batch_size)"
    optimizer, copy = record["optimizer_seconds_per_parameter"], record.get("copy_bytes_per_second")
    if optimizer is not None:
        yield f"optimizer: {1e9 * optimizer:.3g} ms per million parameters"
    if copy is not None:
        yield f"pinned copies between host and device: {copy / 1e9:.1f} GB/s"
    yield f"kept for estimates in {where}"
