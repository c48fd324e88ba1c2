"""What each rank runs: `python -m vlactl.worker --run-dir DIR --job train|sft|eval` under torchrun.

Reads the resolved configuration and the plan from the run directory, has the parts built (see
`vlactl.parts`) and hands them to the training loop or to the evaluator.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from vlactl import logs
from vlactl.api.contracts import EnvSpec
from vlactl.config.compose import load_resolved, without_places
from vlactl.config.run import RunConfig
from vlactl.demonstrations.samples import Samples, load_datasets, merged_statistics
from vlactl.distributed.roles import World, leave_world
from vlactl.errors import EXIT_BUG, EXIT_OK, IntegrityError
from vlactl.evaluate.results import EVAL_REQUEST, claim_weights
from vlactl.evaluate.runner import forget_recordings
from vlactl.hub.manifest import newest_checkpoint, publish
from vlactl.launch.rundir import EXPORTED_CONFIG, MODEL
from vlactl.launch.status import (
    Heartbeat,
    StopFlag,
    join_supervisor,
    write_failure,
    write_result,
)
from vlactl.parts import Parts, build_policy
from vlactl.report.atomic import write_json
from vlactl.report.sinks import MetricsLog
from vlactl.rollout.collect import StopRequested
from vlactl.rollout.episodes import TASK_SUCCESS, TrainingEpisodes
from vlactl.train.checkpoint import load_checkpoint, weights_hash
from vlactl.train.loop import FINISHED, PREEMPTED, Trainer
from vlactl.train.supervised import Imitator

LOG = logging.getLogger(__name__)


def main() -> int:
    """Run one job on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--job", choices=tuple(JOBS), required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    join_supervisor(rank)
    logs.setup(rank)
    heartbeat, stop = Heartbeat(arguments.run_dir, rank), StopFlag()
    heartbeat.beat("start", 0)
    try:
        status = JOBS[arguments.job](arguments.run_dir, heartbeat, stop)
    except Exception as error:
        LOG.exception("rank %d failed", rank)
        write_failure(arguments.run_dir, rank, heartbeat.phase, heartbeat.step, error)
        _leave_at_once(int(getattr(error, "exit_code", EXIT_BUG)))
    leave_world()
    if rank == 0:
        write_result(arguments.run_dir, status)
    return EXIT_OK


def _leave_at_once(code: int) -> NoReturn:
    """Without waiting for peers, which may be gone, or for a thread that writes a checkpoint."""
    logging.shutdown()
    os._exit(code)


def train(run_dir: Path, heartbeat: Heartbeat, stop: StopFlag) -> str:
    """Train from the newest complete checkpoint of the run directory, or from the start."""
    with Parts.build(run_dir, heartbeat, stop, for_training=True) as parts:
        config, world = parts.config, parts.world
        checkpoints = parts.checkpoints(run_dir)
        start_step = checkpoints.resume()
        log = MetricsLog(run_dir, config.sinks if world.is_main else ())
        if world.is_main:
            log.resume_from(start_step)
            forget_recordings(run_dir / "rollouts", start_step + 1)
            forget_recordings(run_dir / "evals", start_step + 1)
        world.everyone.barrier()
        try:
            return Trainer(
                config=config,
                run_dir=run_dir,
                world=world,
                grid=parts.grid(),
                env_processes=parts.plan.roles["env"],
                needs=config.algorithm.needs(),
                episodes=TrainingEpisodes(
                    parts.spec.tasks,
                    config.rollout,
                    group_size=parts.plan.group_size,
                    seed=config.train.seed,
                    start_step=start_step,
                    history=_history(config, world, log, start_step),
                ),
                algorithm=parts.algorithm,
                roller=parts.roller,
                updater=parts.updater(heartbeat),
                weights=parts.weights,
                checkpoints=checkpoints,
                evaluator=parts.evaluator(_while_training(config, run_dir)),
                spill=parts.spill,
                log=log,
                heartbeat=heartbeat,
                stop=stop,
                start_step=start_step,
            ).run()
        finally:
            log.close()


def _history(
    config: RunConfig, world: World, log: MetricsLog, start_step: int
) -> list[dict[str, float]]:
    """How training episodes went in the steps before, if they decide about the coming ones.

    Raises:
        IntegrityError: metrics of some step are missing.
    """
    if config.rollout.order != "informative" or start_step == 0:
        return []
    lines = log.read() if world.is_main else []
    mine = [
        {name: value for name, value in line.items() if name.startswith(TASK_SUCCESS)}
        for line in lines
    ]
    history = [metrics for of_rank in world.everyone.gather(mine) for metrics in of_rank if metrics]
    if len(history) != start_step:
        raise IntegrityError(
            f"{log.path} has metrics of {len(history)} steps: {start_step} were played",
            hint='rollout.order = "informative" goes by them: put the file back',
        )
    return history


def imitate(run_dir: Path, heartbeat: Heartbeat, stop: StopFlag) -> str:
    """Train on demonstrations, from the newest complete checkpoint or from the start."""
    config = load_resolved(run_dir / "config.json")
    folders = [Path(folder) for folder in config.sft.data]
    statistics = merged_statistics(folders)
    with Parts.build(run_dir, heartbeat, stop, for_training=True, statistics=statistics) as parts:
        world, actor = parts.world, parts.actor
        checkpoints = parts.checkpoints(run_dir)
        start_step = checkpoints.resume()
        log = MetricsLog(run_dir, config.sinks if world.is_main else ())
        if world.is_main:
            log.resume_from(start_step)
            forget_recordings(run_dir / "evals", start_step + 1)
        world.everyone.barrier()
        try:
            status = Imitator(
                config=config,
                run_dir=run_dir,
                world=world,
                samples=load_samples(config, parts.spec) if actor else None,
                actor=actor,
                weights=parts.weights,
                checkpoints=checkpoints,
                evaluator=parts.evaluator(_while_training(config, run_dir)),
                log=log,
                heartbeat=heartbeat,
                stop=stop,
                start_step=start_step,
            ).run()
        finally:
            log.close()
        if status == FINISHED and world.is_main:
            write_model(config, parts.spec, run_dir, statistics)
        return status


def load_samples(config: RunConfig, spec: EnvSpec) -> Samples:
    """What a supervised run learns from, with pictures of the size that the environment has."""
    cameras = config.model.cameras
    return load_datasets(
        [Path(folder) for folder in config.sft.data],
        cameras=cameras,
        chunk_length=config.model.chunk_length,
        image_size=spec.cameras[cameras[0]][0],
        every=config.sft.every,
        demos_per_task=config.sft.demos_per_task,
    )


def write_model(
    config: RunConfig, spec: EnvSpec, run_dir: Path, statistics: Mapping[str, Any]
) -> None:
    """Write the last checkpoint in the layout that `model.path` reads, adapters merged.

    The policy is built anew on the CPU: the one that was trained may be sharded or quantised.

    Raises:
        UserError: it cannot be written.
    """
    policy = build_policy(
        config,
        spec,
        torch.device("cpu"),
        for_training=False,
        for_export=True,
        statistics=statistics,
    )
    checkpoint, _ = newest_checkpoint(run_dir)
    assert checkpoint is not None, "a run that is finished has saved its last step"
    load_checkpoint(checkpoint, policy.module)
    final, temporary = run_dir / MODEL, run_dir / f"{MODEL}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir()
    policy.export(temporary, adapter_only=False)
    write_json(temporary / EXPORTED_CONFIG, without_places(config))
    shutil.rmtree(final, ignore_errors=True)  # of the run before it was told to go further
    publish(temporary, final)


def _while_training(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """What is evaluated every `eval.every` steps."""
    return {
        "tasks": config.rollout.tasks,
        "trials": config.eval.trials,
        "passes": 1,
        "policy": {"label": f"{run_dir} in training"},
    }


def evaluate(run_dir: Path, heartbeat: Heartbeat, stop: StopFlag) -> str:
    """Play the episodes of the request with the requested weights."""
    request = json.loads((run_dir / EVAL_REQUEST).read_text())
    policy = request["policy"]
    with Parts.build(run_dir, heartbeat, stop, for_training=False) as parts:
        if policy["checkpoint"] and parts.acting is not None:
            checkpoint, ranks = Path(policy["checkpoint"]), parts.world.rollout
            load_checkpoint(checkpoint, parts.acting.module, group=ranks)
        if parts.world.is_main and parts.acting is not None:
            policy["sha256"] = claim_weights(run_dir, weights_hash(parts.acting.module))
        parts.weights.begin(0, check=False)
        try:
            parts.evaluator(request).run(
                run_dir, 0, lambda done, total: heartbeat.beat("evaluate", 0, done, total)
            )
        except StopRequested:
            return PREEMPTED
        return FINISHED


JOBS = {"train": train, "sft": imitate, "eval": evaluate}

if __name__ == "__main__":
    sys.exit(main())
