"""What `vlactl bench model` runs: `python -m vlactl.bench --job-dir DIR --rows 1,8 --seconds 3`.

The job directory holds the resolved configuration, and gets what was measured. The configured
policy is built on one device through the plugin API, as a worker would build it, and is shown
random observations: no simulator, no process group, no sharding.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vlactl import logs
from vlactl.api.contracts import EnvSpec, ObservationBatch, Policy, Sample, TrainBatch
from vlactl.api.noise import generator, make_key
from vlactl.config.compose import load_resolved
from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_BUG, EXIT_OK, ConfigError
from vlactl.launch.plan import environment_spec
from vlactl.launch.rundir import CONFIG
from vlactl.launch.status import Heartbeat, join_supervisor, write_failure
from vlactl.parts import build_policy
from vlactl.report.atomic import write_json
from vlactl.train.optim import make_optimizer

LOG = logging.getLogger(__name__)
MEASURED = "measured.json"
RECOMPUTATIONS = ("none", "selective", "full")
_COPIED_BYTES = 2**30
_LEAST_CALLS = 3
Record = dict[str, Any]


def main() -> int:
    """Measure one policy; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job-dir", type=Path, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    join_supervisor(0)
    logs.setup(0)
    heartbeat = Heartbeat(arguments.job_dir, 0)
    try:
        config = load_resolved(arguments.job_dir / CONFIG)
        rows = [int(number) for number in arguments.rows.split(",")]
        bench = Bench(config, rows, arguments.seconds, heartbeat)
        write_json(arguments.job_dir / MEASURED, bench.run())
    except Exception as error:
        LOG.exception("the benchmark failed")
        write_failure(arguments.job_dir, 0, heartbeat.phase, 0, error)
        return int(getattr(error, "exit_code", EXIT_BUG))
    return EXIT_OK


class Bench:
    """One policy, built once for each way of recomputing activations.

    Args:
        config: of a run.
        rows: sizes of inference batches.
        seconds: of each measurement, at least.
        heartbeat: tells which one it is.
    """

    def __init__(
        self, config: RunConfig, rows: Sequence[int], seconds: float, heartbeat: Heartbeat
    ) -> None:
        self._config = config
        self._rows = rows
        self._seconds = seconds
        self._heartbeat = heartbeat
        self._spec = environment_spec(config)
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def run(self) -> Record:
        """Everything that is measured."""
        record: Record = {
            "measured": datetime.now(tz=UTC).date().isoformat(),
            "versions": logs.versions(),
            "update": {},
        }
        if self._device.type == "cuda":
            record["copy_bytes_per_second"] = self._copy_speed()
        for recomputation in RECOMPUTATIONS:
            self._heartbeat.beat("build", 0)
            policy = self._build(recomputation)
            if "inference" not in record:
                self._heartbeat.beat("inference", 0)
                record["inference"] = {str(n): self._infer(policy, n) / n for n in self._rows}
            self._heartbeat.beat(recomputation, 0)
            update = self._update(policy)
            if update is not None:
                record["update"][recomputation] = update
            if recomputation == RECOMPUTATIONS[-1]:
                self._heartbeat.beat("optimizer", 0)
                record["optimizer_seconds_per_parameter"] = self._optimizer_step(policy)
            del policy
            self._free()
        return record

    def _build(self, recomputation: str) -> Policy:
        train = self._config.train.model_copy(update={"activation_checkpointing": recomputation})
        config = self._config.model_copy(update={"train": train})
        return build_policy(config, self._spec, self._device, for_training=True)

    def _infer(self, policy: Policy, rows: int) -> float:
        batch, mode = self._observe(rows), Sample(self._config.rollout.temperature)
        keys = [make_key("bench", row) for row in range(rows)]
        return self._time(lambda: policy.act(batch, mode, keys))

    def _update(self, policy: Policy) -> Record | None:
        """Seconds per sample and peak memory of one micro-batch; None where it does not fit."""
        samples = self._config.optim.micro_batch_size
        batch = self._observe(samples)
        keys = [make_key("bench", row) for row in range(samples)]
        try:
            chunks = policy.act(batch, Sample(self._config.rollout.temperature), keys)
            if chunks.tokens_BKA is None:
                raise ConfigError("this policy can be evaluated, but not trained")
            judged = TrainBatch(
                observations=batch,
                tokens_SKA=torch.from_numpy(chunks.tokens_BKA).to(self._device),
                temperature=self._config.rollout.temperature,
            )
            self._free()
            seconds = self._time(lambda: _backward(policy, judged))
        except torch.OutOfMemoryError:
            return None
        return {
            "samples": samples,
            "seconds_per_sample": seconds / samples,
            "peak_bytes": self._peak(),
        }

    def _optimizer_step(self, policy: Policy) -> float | None:
        """Seconds per trained parameter; None where the moments do not fit."""
        parameters = [parameter for _, parameter in policy.trainable()]
        try:
            optimizer = make_optimizer(policy.trainable(), self._config.optim)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            seconds = self._time(optimizer.step)
        except torch.OutOfMemoryError:
            return None
        return seconds / sum(parameter.numel() for parameter in parameters)

    def _copy_speed(self) -> float:
        """Bytes per second, mean of both directions."""
        on_host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        on_device = torch.empty_like(on_host, device=self._device)
        there = self._time(lambda: on_device.copy_(on_host, non_blocking=True))
        back = self._time(lambda: on_host.copy_(on_device, non_blocking=True))
        return 2 * _COPIED_BYTES / (there + back)

    def _observe(self, rows: int) -> ObservationBatch:
        return random_observations(self._spec, self._config.model.cameras, rows)

    def _time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one that does not count."""
        self._clock(call)
        taken: list[float] = []
        while len(taken) < _LEAST_CALLS or sum(taken) < self._seconds:
            taken.append(self._clock(call))
        return median(taken)

    def _clock(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def random_observations(spec: EnvSpec, cameras: Sequence[str], rows: int) -> ObservationBatch:
    """Noise in the shape of observations, with the instructions of the first tasks."""
    numbers = generator("bench", rows)
    images = {
        camera: numbers.integers(0, 256, (rows, *spec.cameras[camera], 3), dtype=np.uint8)
        for camera in cameras
    }
    return ObservationBatch(
        images=images,
        state=numbers.normal(size=(rows, spec.state_dim)).astype(np.float32),
        instructions=tuple(spec.tasks[row % len(spec.tasks)].instruction for row in range(rows)),
    )


def _backward(policy: Policy, batch: TrainBatch) -> None:
    """Forward and backward pass; gradients are made anew, as in a step's first micro-batch."""
    for _, parameter in policy.trainable():
        parameter.grad = None
    out = policy.evaluate_actions(batch)
    loss = out.logprobs_SKA.mean()
    if out.values_SK is not None:
        loss = loss + out.values_SK.mean()
    loss.backward()


if __name__ == "__main__":
    sys.exit(main())
