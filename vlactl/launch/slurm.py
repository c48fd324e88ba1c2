"""The batch script by which Slurm runs a training on its machines, as often as it takes.

One task per node starts `vlactl train` as node $SLURM_NODEID. Some minutes before the time is up
Slurm asks for an end; the run saves, leaves with exit code 75, and is put back into the queue,
where `--resume auto` goes on with it. Nothing of a user's text reaches the shell unquoted.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlactl.errors import EXIT_PREEMPTED, ConfigError
from vlactl.report.atomic import atomic_path

_SPARE_SECONDS = 60
"""Between the last moment for saving and the end of the job's time."""
_MOST_SECONDS = 65535
"""Slurm takes no more in --signal."""

_SCRIPT = """\
#!/bin/bash
{directives}

# Written by `vlactl train --launcher slurm`. Submit it with: sbatch {path}
set -u
cd {directory}
train=({command})
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${{hosts%%$'\\n'*}}
port=$((20000 + SLURM_JOB_ID % 400 * 25))
cpus=(${{SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}})

# shellcheck disable=SC2016 - every task has a SLURM_NODEID of its own
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 ${{cpus[@]+"${{cpus[@]}}"}} \\
    --cpu-bind=none --kill-on-bad-exit=0 --wait=120 \\
    bash -c 'exec "$@" --node-rank "$SLURM_NODEID"' vlactl \\
    "${{train[@]}}" --nnodes "$SLURM_JOB_NUM_NODES" --rdzv "$first:$port" </dev/null &
job=$!
told=
# srun itself would kill its tasks on SIGTERM; the first step of a job is number 0.
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$job"
code=$?
while [ -n "$told" ]; do # a signal ends `wait`, not what it waits for
    told=
    wait "$job"
    code=$?
done
if [ "$code" -eq {preempted} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """What is to be run, and on how much of a cluster.

    Attributes:
        name: of the job, for lists.
        nnodes: machines.
        gpus: of each; None = whole machines.
        arguments: of `vlactl train`; paths are absolute.
        saving_seconds: that a checkpoint may take.
        directives: more lines for Slurm, such as "--partition=gpu"; they win.
    """

    name: str
    nnodes: int
    gpus: int | None
    arguments: Sequence[str]
    saving_seconds: float
    directives: Sequence[str]


def batch_script(job: BatchJob, path: Path, directory: Path) -> str:
    """The text of the script.

    Raises:
        ConfigError: a directive is not one line that starts with a dash.
    """
    command = [sys.executable, "-m", "vlactl.cli.app", "train", *job.arguments]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(job)),
        path=_comment(shlex.quote(str(path))),
        directory=shlex.quote(str(directory)),
        command=shlex.join(command),
        preempted=EXIT_PREEMPTED,
    )


def write_script(job: BatchJob, path: Path) -> None:
    """Write the script, to run in the present directory.

    Raises:
        ConfigError: a directive is not one line that starts with a dash.
    """
    text = batch_script(job, path, Path.cwd())
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _directives(job: BatchJob) -> list[str]:
    for line in job.directives:
        if not line.startswith("-") or not line.isprintable():
            raise ConfigError(
                f"--sbatch {line!r} is not an option of sbatch",
                hint='one option each time: --sbatch "--partition=gpu" --sbatch "--time=12:00:00"',
            )
    seconds = min(math.ceil(job.saving_seconds) + _SPARE_SECONDS, _MOST_SECONDS)
    share = "--exclusive" if job.gpus is None else f"--gpus-per-node={job.gpus}"
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nnodes}",
        "--ntasks-per-node=1",
        share,
        f"--signal=B:TERM@{seconds}",
        "--requeue",
        "--open-mode=append",
        *job.directives,
    ]


def _comment(text: str) -> str:
    """Text that ends no comment."""
    return "".join(character if character.isprintable() else "?" for character in text)
