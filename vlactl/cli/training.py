"""From the options of `vlactl train` to a run: new or resumed, planned, checked, supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vlactl.api import registry
from vlactl.cli.output import print_table, print_text
from vlactl.config import presets
from vlactl.config.compose import compose, load_resolved, override
from vlactl.config.layers import Leaf, nest
from vlactl.config.run import RESUMABLE_KEYS, RunConfig
from vlactl.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_PREEMPTED, ConfigError
from vlactl.evaluate.results import EVAL_SUMMARY
from vlactl.hub.manifest import list_checkpoints, resume_point, step_of
from vlactl.hub.models import DOWNLOADED, PATH_KEY, with_absolute_paths, with_downloaded
from vlactl.launch.hardware import Hardware, detect, suppose_gpus
from vlactl.launch.network import ALONE, Cluster
from vlactl.launch.nodes import send_home
from vlactl.launch.plan import Plan, describe, make_plan
from vlactl.launch.preflight import check_machine
from vlactl.launch.progress import make_progress
from vlactl.launch.rundir import (
    CONFIG,
    create_run_dir,
    lock_run,
    new_run_dir,
    newest_run,
    write_run,
)
from vlactl.launch.supervise import job_command, supervise

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be run, and where; `provenance` is None for a run that goes on."""

    config: RunConfig
    run_dir: Path
    provenance: Mapping[str, str] | None

    @property
    def is_new(self) -> bool:
        """Whether the run directory is yet to be made."""
        return self.provenance is not None


def find_request(
    preset: str, sets: Sequence[str], resume: str | None, root: Path, run_dir: Path | None
) -> Request:
    """The run that a command line asks for.

    Raises:
        ConfigError: it asks for nothing, for too much, or for a run that does not exist.
    """
    if resume is not None and not resume:
        raise ConfigError("--resume names no run", hint="--resume RUN, or --resume auto")
    if resume == AUTO and preset:
        return _newest_or_new(preset, sets, root, run_dir)
    if resume and (preset or run_dir):
        raise ConfigError(
            "--resume reads the configuration and the place of the run that it goes on with",
            hint="leave out --preset and --run-dir, or go on with a preset's newest run: "
            "--preset NAME --resume auto",
        )
    if resume:
        return _resumed(_find_run(resume, root), sets)
    if not preset:
        raise ConfigError("which preset?", hint=_teach())
    return _new(preset, sets, root, run_dir)


def start(request: Request, *, gpus: int | None, dry_run: bool, cluster: Cluster = ALONE) -> int:
    """Plan the run, show the plan, and unless this is a dry run, run it; returns the exit code.

    Raises:
        UserError: it cannot be planned or started, or it failed.
    """
    hardware = detect()
    if dry_run and gpus is not None:
        hardware = suppose_gpus(hardware, gpus)
    plan = plan_run(request.config, hardware, gpus, cluster.nnodes)
    if not dry_run:
        check_startable(request, plan)
    if not request.is_new and not dry_run and _nothing_left(request):
        send_home(request.run_dir, cluster)
        return EXIT_OK
    for line in _describe(plan, request.run_dir, cluster):
        print_text(f" {line}")
    if dry_run:
        print_text(" nothing was started")
        return EXIT_OK
    code = _run(request, plan, hardware, cluster)
    _say_what_next(request, code, cluster)
    return code


def _describe(plan: Plan, run_dir: Path, cluster: Cluster) -> list[str]:
    """The plan in lines, with the command of this machine where there are several."""
    lines = describe(plan, run_dir)
    if cluster.nnodes == 1:
        return lines
    command = job_command(plan, cluster, cluster.port, run_dir=run_dir, job="train")
    return [
        f"{'command':<9} {' '.join(command)}" if line.startswith("command ") else line
        for line in lines
    ]


def plan_run(config: RunConfig, hardware: Hardware, gpus: int | None, nnodes: int) -> Plan:
    """The plan for `gpus` devices on each of some machines that are like this one.

    Raises:
        ConfigError: a number does not work out.
    """
    if nnodes == 1:
        return make_plan(config, hardware, gpus=gpus)
    return make_plan(config, hardware, gpus=gpus, nodes=nnodes)


def _new(preset: str, sets: Sequence[str], root: Path, run_dir: Path | None) -> Request:
    composed = compose(preset, sets)
    config = with_downloaded(composed.config)
    provenance = dict(composed.provenance)
    if config != composed.config:
        provenance[PATH_KEY] = DOWNLOADED
    place = run_dir or new_run_dir(root, config.run_name)
    config = _without_demonstrations(with_absolute_paths(config))
    return Request(config=config, run_dir=place, provenance=provenance)


def _without_demonstrations(config: RunConfig) -> RunConfig:
    """The configuration of a run that learns from none: `sft.data` marks supervised runs."""
    return override(config, [nest("sft.data", Leaf([], ""))]) if config.sft.data else config


def _newest_or_new(preset: str, sets: Sequence[str], root: Path, run_dir: Path | None) -> Request:
    """What a batch system repeats until it is done: the first time starts, later times go on."""
    fresh = _new(preset, sets, root, run_dir)
    if run_dir is not None:
        found = run_dir if (run_dir / CONFIG).exists() else None
    else:
        found = newest_run(root, fresh.config.run_name)
    return _resumed(found, sets) if found else fresh


def _resumed(run_dir: Path, sets: Sequence[str]) -> Request:
    config = override(load_resolved(run_dir / CONFIG), sets, RESUMABLE_KEYS)
    if config.sft.data:
        raise ConfigError(
            f"{run_dir} is a supervised run", hint=f"go on with it: vlactl sft --resume {run_dir}"
        )
    return Request(config=with_absolute_paths(config), run_dir=run_dir, provenance=None)


def _find_run(text: str, root: Path) -> Path:
    newest = newest_run(root)
    if text == AUTO and newest:
        return newest
    if text != AUTO and (Path(text) / CONFIG).is_file():
        return Path(text)
    where = f"no runs in {root}" if text == AUTO else f"{text} is not a run: it has no {CONFIG}"
    hint = f"the newest run: {newest}" if newest else "start one: vlactl train --preset NAME"
    raise ConfigError(where, hint=hint)


def check_startable(request: Request, plan: Plan) -> None:
    """Check what can be checked before processes are started.

    Raises:
        UserError: it cannot be started, or not on this machine.
    """
    if plan.blockers:
        raise cannot_start(request, plan)
    for name in request.config.sinks:
        registry.require(registry.find("sink", name))
    check_machine(request.config, plan)


def cannot_start(request: Request, plan: Plan) -> ConfigError:
    """What to say where a plan has blockers."""
    return ConfigError(
        f"{request.config.run_name} can be planned but not started:\n" + "\n".join(plan.blockers),
        hint="change what blocks it with --set, or choose another: vlactl presets list"
        if request.is_new
        else "a directory that was moved: --set model.path=DIR, --set lora.adapter=DIR",
    )


def _nothing_left(request: Request) -> bool:
    """Say where a run goes on, and whether it has steps or an evaluation left."""
    checkpoint, skipped = resume_point(request.run_dir)
    for reason in skipped:
        print_text(f" passed over: {reason}")
    if checkpoint is None:
        print_text(" no checkpoint yet: the run starts from its beginning")
        return False
    done, wanted = step_of(checkpoint), request.config.train.max_steps
    is_measured = (request.run_dir / "evals" / checkpoint.name / EVAL_SUMMARY).exists()
    if done >= wanted and (request.config.eval.every == 0 or is_measured):
        print_text(f" {request.run_dir} is at step {done} of {wanted}: there is nothing left to do")
        print_text(f" go further with --set train.max_steps={2 * done}")
        return True
    print_text(f" going on after step {done}, from {checkpoint}")
    return False


def _run(request: Request, plan: Plan, hardware: Hardware, cluster: Cluster) -> int:
    if request.is_new:
        create_run_dir(request.run_dir)
    with lock_run(request.run_dir) as taken_over:
        if taken_over:
            print_text(f" {taken_over}")
        write_run(request.run_dir, request.config, plan, request.provenance, hardware)
        progress = make_progress(print_text, request.config.train.max_steps, Console())
        return supervise(
            request.run_dir,
            plan,
            "train",
            config=request.config,
            progress=progress,
            cluster=cluster,
        )


def _say_what_next(request: Request, code: int, cluster: Cluster) -> None:
    run = request.run_dir
    go_on = ("go on", f"vlactl train --resume {run}{cluster.options}")
    lines = {
        EXIT_OK: [
            ("finished", f"{_newest_checkpoint(run)}   metrics in {run / 'metrics.jsonl'}"),
            ("measure", f"vlactl eval --run {run}"),
            ("watch", f"vlactl video --run {run}"),
        ],
        EXIT_PREEMPTED: [("stopped", f"as asked; saved {_newest_checkpoint(run)}"), go_on],
        EXIT_INTERRUPTED: [("interrupted", f"last saved: {_newest_checkpoint(run)}"), go_on],
    }
    print_table(lines[code])


def _newest_checkpoint(run_dir: Path) -> str:
    checkpoints = list_checkpoints(run_dir)
    return str(checkpoints[-1][1]) if checkpoints else "nothing"


def _teach() -> str:
    names = [preset.name for preset in presets.shipped()]
    small = [name for name in names if "tiny" in name or "toy" in name]
    return "\n".join(
        [
            "vlactl train --preset NAME             start",
            "vlactl train --preset NAME --dry-run   see what it would do",
            "vlactl presets list                    choose among all " + str(len(names)),
            "without a GPU: " + ", ".join(small),
        ]
    )
