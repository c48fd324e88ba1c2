"""`vlactl train` on one machine or several: what this one does, node 0, another one, or for Slurm.

What node 0 does, which is all on one machine, is in `vlactl.cli.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from vlactl.cli.output import print_table, print_text
from vlactl.cli.training import AUTO, Request, cannot_start, find_request, plan_run, start
from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, ConfigError
from vlactl.launch.follow import follow
from vlactl.launch.hardware import detect, suppose_gpus
from vlactl.launch.network import Cluster, check_nnodes, find_cluster
from vlactl.launch.plan import Plan, policy_blockers
from vlactl.launch.preflight import check_machine
from vlactl.launch.rundir import runs_root
from vlactl.launch.slurm import BatchJob, batch_script, write_script


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A command line of `vlactl train`."""

    preset: str
    sets: Sequence[str]
    resume: str | None
    runs_dir: Path | None
    run_dir: Path | None
    gpus: int | None
    nnodes: int
    node_rank: int | None
    rdzv: str
    interface: str
    sbatch: Sequence[str]

    def request(self) -> Request:
        """The run that is asked for."""
        root = runs_root(self.runs_dir)
        return find_request(self.preset, self.sets, self.resume, root, self.run_dir)


def run(options: Options, *, dry_run: bool, slurm: bool) -> int:
    """Do what a command line asks for; returns the exit code.

    Raises:
        UserError: it cannot be done, or the run failed.
    """
    if slurm:
        return submit(options, dry_run=dry_run)
    if options.sbatch:
        raise ConfigError("--sbatch is for --launcher slurm", hint="leave it out, or add that")
    cluster = find_cluster(options.nnodes, options.node_rank or 0, options.rdzv, options.interface)
    if cluster.nnodes > 1 and not dry_run:
        _check_place(options)
    if cluster.is_leader or dry_run:
        return start(options.request(), gpus=options.gpus, dry_run=dry_run, cluster=cluster)
    return take_part(options, cluster)


def take_part(options: Options, cluster: Cluster) -> int:
    """Do this machine's part of a run that node 0 leads; returns the exit code.

    Raises:
        UserError: it cannot be done, or the run failed.
    """
    run_dir = options.run_dir or Path(options.resume or "")

    def check(config: RunConfig, plan: Plan) -> None:
        _check_part(config, plan, cluster, options.gpus)

    code = follow(run_dir, cluster, check=check, note=lambda text: print_text(f" {text}"))
    words = {
        EXIT_OK: "finished",
        EXIT_PREEMPTED: "stopped as asked",
        EXIT_INTERRUPTED: "interrupted",
    }
    print_text(f" {words.get(code, f'node 0 left with exit code {code}')}: {run_dir}")
    return code


def _check_place(options: Options) -> None:
    """Several machines have to be told the same folder."""
    if options.run_dir is None and options.resume in (None, "", AUTO):
        raise ConfigError(
            f"--nnodes {options.nnodes}: which run directory?",
            hint="one on a disk that all nodes share: --run-dir DIR, or --resume DIR for a run "
            "that goes on",
        )


def _check_part(config: RunConfig, plan: Plan, cluster: Cluster, gpus: int | None) -> None:
    """Whether this machine can hold its ranks of node 0's plan."""
    if plan.nodes != cluster.nnodes:
        raise ConfigError(
            f"--nnodes {cluster.nnodes}: node 0 has planned for {plan.nodes}",
            hint="--nnodes is the same on all nodes",
        )
    num_ranks = plan.world_size // plan.nodes
    if gpus is not None and gpus != num_ranks:
        raise ConfigError(
            f"--gpus {gpus}: node 0 has planned {num_ranks} ranks on every node",
            hint="--gpus is the same on all nodes",
        )
    first = cluster.node_rank * num_ranks
    wanted = max(plan.devices[first : first + num_ranks]) + 1
    visible = len(detect().gpus)
    if plan.device == "cuda" and visible < wanted:
        raise ConfigError(
            f"the plan needs {wanted} GPUs on every node; {visible} visible here",
            hint="ask for fewer with --gpus on all nodes, or change CUDA_VISIBLE_DEVICES",
        )
    if blockers := policy_blockers(config):
        raise ConfigError("this policy cannot be built here:\n" + "\n".join(blockers))
    check_machine(config, plan)


def submit(options: Options, *, dry_run: bool) -> int:
    """Write the batch script of a run beside its run directory; returns the exit code.

    Raises:
        UserError: the run cannot be planned, or an option does not go with Slurm.
    """
    if options.rdzv or options.node_rank is not None:
        raise ConfigError(
            "--rdzv and --node-rank: Slurm says which machines there are",
            hint="leave them out with --launcher slurm",
        )
    check_nnodes(options.nnodes)
    request = options.request()
    if options.gpus is not None:
        hardware = suppose_gpus(detect(), options.gpus)
        plan = plan_run(request.config, hardware, options.gpus, options.nnodes)
        if plan.blockers:
            raise cannot_start(request, plan)
    job = BatchJob(
        name=request.config.run_name,
        nnodes=options.nnodes,
        gpus=options.gpus,
        arguments=_arguments(options, request),
        saving_seconds=request.config.checkpoint.max_seconds,
        directives=options.sbatch,
    )
    run_dir = request.run_dir.absolute()
    path = run_dir.with_name(f"{run_dir.name}.sbatch")
    if dry_run:
        print_text(batch_script(job, path, Path.cwd()))
        return EXIT_OK
    write_script(job, path)
    print_table([("written", path), ("run dir", run_dir), ("submit", f"sbatch {quote(str(path))}")])
    return EXIT_OK


def _arguments(options: Options, request: Request) -> list[str]:
    """Of the command that every node runs, however often the job is requeued."""
    run_dir = str(request.run_dir.absolute())
    if request.is_new or options.preset:
        preset = options.preset
        if preset.endswith(".toml"):
            preset = str(Path(preset).absolute())
        arguments = ["--preset", preset, "--resume", AUTO, "--run-dir", run_dir]
    else:
        arguments = ["--resume", run_dir]
    for text in options.sets:
        arguments += ["--set", text]
    if options.gpus is not None:
        arguments += ["--gpus", str(options.gpus)]
    if options.interface:
        arguments += ["--interface", options.interface]
    return arguments
