"""`vlactl eval`: the success rate of a policy over a suite, every (task, trial) once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vlactl.cli.output import print_table, print_text
from vlactl.errors import ConfigError

EVALS_ROOT = Path("evals")


def evaluate(
    suite: Annotated[
        str | None, typer.Option(help="Suite, e.g. libero-spatial; default: the run's own.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, help="Initial states per task, from the first; default: all."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help='Task indices, e.g. "0-3,7"; default: all.')
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "--model",
            "--run",
            help="Run, checkpoint or model directory; default: newest run.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Configuration of a model directory, or an untrained policy.")
    ] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--sampled", help="Default: as the preset says.")
    ] = None,
    repeats: Annotated[
        int, typer.Option("--passes", min=1, help="Episodes per (task, trial).")
    ] = 1,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices (CPU ranks without GPUs).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the same folder again continues.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write eval.json to this file.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `vlactl train`.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: ./runs.")
    ] = None,
) -> None:
    """Measure a policy: every (task, trial) once, a table with 95 % intervals, eval.json.

    Examples:
      vlactl eval --suite libero-spatial --trials 5
      vlactl eval --suite libero-90 --greedy --checkpoint runs/NAME/TIME --json out.json
      vlactl eval --preset libero_spatial_tiny_grpo --tasks 0,3 --trials 2     untrained, for
      comparison
    """
    request = EvalRequest.resolve(
        suite=suite,
        tasks=tasks,
        trials=trials,
        repeats=repeats,
        checkpoint=checkpoint,
        preset=preset,
        greedy=greedy,
        overrides=set_ or [],
        runs_dir=runs_dir,
    )
    folder = out or request.default_folder(EVALS_ROOT)
    summary = run_evaluation(request, folder, gpus)
    show(summary)
    if json_file is not None:
        from vlactl.report.atomic import write_json

        write_json(json_file, summary)
    print_text(f"\n results   {folder}/eval.json\n films     vlactl video {folder}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRequest:
    """What is to be measured: `config` says how, `episodes` which."""

    config: Any
    label: str
    episodes: dict[str, Any]
    num_episodes: int

    @classmethod
    def resolve(
        cls,
        *,
        suite: str | None,
        tasks: str | None,
        trials: int | None,
        repeats: int,
        checkpoint: Path | None,
        preset: str | None,
        greedy: bool | None,
        overrides: Sequence[str],
        runs_dir: Path | None,
    ) -> EvalRequest:
        """Find the policy and the episodes; refuses tasks and trials that do not exist.

        Raises:
            UserError: something that was named does not exist or is damaged.
        """
        from vlactl.cli.policies import find_policy
        from vlactl.launch.rundir import runs_root

        wanted = [f"env.suite={suite}"] * (suite is not None)
        wanted += [f"rollout.tasks={tasks}"] * (tasks is not None)
        wanted += [f"eval.trials=0-{trials - 1}"] if trials is not None else []
        wanted += [f"eval.greedy={str(greedy).lower()}"] if greedy is not None else []
        source = find_policy(checkpoint, preset, runs_root(runs_dir), [*wanted, *overrides])
        # The tasks that a run was trained on do not limit what it is measured on.
        chosen = source.config.rollout.tasks if tasks is not None or suite is None else None
        episodes = {
            "tasks": chosen,
            "trials": source.config.eval.trials,
            "repeats": repeats,
            "checkpoint": source.checkpoint,
        }
        return cls(
            config=source.config,
            label=source.label,
            episodes=episodes,
            num_episodes=_count_episodes(source.config, episodes),
        )

    def default_folder(self, root: Path) -> Path:
        """A new folder named by suite and time."""
        from vlactl.launch.rundir import new_run_dir

        return new_run_dir(root, getattr(self.config.env, "suite", self.config.env.name))


def _count_episodes(config: Any, episodes: dict[str, Any]) -> int:
    from vlactl.launch.plan import environment_spec
    from vlactl.rollout.episodes import select_pairs

    pairs = select_pairs(environment_spec(config).tasks, episodes["tasks"], episodes["trials"])
    return len(pairs) * int(episodes["repeats"])


def run_evaluation(request: EvalRequest, folder: Path, gpus: int | None) -> dict[str, Any]:
    """Play what the folder does not hold yet and return eval.json.

    Raises:
        typer.Exit: the job was interrupted or preempted; the same folder continues it.
        UserError: it failed.
    """
    from rich.console import Console

    from vlactl.launch.hardware import detect
    from vlactl.launch.plan import plan_evaluation
    from vlactl.launch.preflight import check_machine
    from vlactl.launch.progress import make_progress
    from vlactl.launch.rundir import lock_run
    from vlactl.launch.supervise import supervise

    config = request.config
    if blockers := config.model.blockers():
        raise ConfigError("this policy cannot be evaluated", hint="\n".join(blockers))
    plan = plan_evaluation(config, detect(), gpus=gpus, num_episodes=request.num_episodes)
    check_machine(config, plan)
    _prepare(folder, request, plan)
    print_text(
        f" policy    {request.label}\n episodes  {request.num_episodes}\n folder    {folder}"
    )
    with lock_run(folder) as note:
        if note:
            print_text(f" {note}")
        progress = make_progress(print_text, 1, Console())
        exit_code = supervise(folder, plan, "eval", config=config, progress=progress)
    if exit_code != 0:
        print_text(f" not finished; continue with the same command and --out {folder}")
        raise typer.Exit(exit_code)
    summary: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    return summary


def _prepare(folder: Path, request: EvalRequest, plan: Any) -> None:
    """Make the folder, or check that it belongs to the same evaluation."""
    from vlactl.config.compose import dump, load_resolved
    from vlactl.evaluate.results import EVAL_REQUEST
    from vlactl.launch.rundir import CONFIG, create_run_dir, write_run
    from vlactl.report.atomic import write_json

    asked = json.loads(json.dumps(request.episodes))
    if (folder / EVAL_REQUEST).is_file():
        before = json.loads((folder / EVAL_REQUEST).read_text())
        same_config = dump(load_resolved(folder / CONFIG)) == dump(request.config)
        if before != asked or not same_config:
            raise ConfigError(
                f"{folder} holds another evaluation",
                hint="continue it with the options it was started with, or choose another --out",
            )
    else:
        create_run_dir(folder)
        write_json(folder / EVAL_REQUEST, asked)
    write_run(folder, request.config, plan)


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    from vlactl.evaluate.results import TABLE_HEADER, table

    mode = summary["mode"]
    if summary["temperature"] is not None:
        mode += f" at temperature {summary['temperature']:g}"
    print_text(f"\n success rate, {mode}")
    print_table(table(summary), TABLE_HEADER)
