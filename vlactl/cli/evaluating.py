"""From the options of `vlactl eval` to a table: which policy, which episodes, and their count."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from vlactl.api.contracts import Task
from vlactl.cli.environments import suite_of
from vlactl.cli.output import print_markdown, print_table, print_text
from vlactl.cli.policies import SUITE, find_policy
from vlactl.config.compose import diff, dump, load_resolved
from vlactl.config.explain import render
from vlactl.config.layers import Tree, parse_override
from vlactl.config.run import RunConfig
from vlactl.errors import EXIT_OK, ConfigError
from vlactl.evaluate.results import (
    EVAL_REQUEST,
    EVAL_SUMMARY,
    REDONE_EPISODES,
    TABLE_HEADER,
    describe_mode,
    read_request,
    read_results,
    read_summary,
    table,
)
from vlactl.hub.models import with_absolute_paths
from vlactl.launch.hardware import detect
from vlactl.launch.plan import environment_spec, plan_evaluation, policy_blockers
from vlactl.launch.preflight import check_machine
from vlactl.launch.progress import make_progress
from vlactl.launch.rundir import CONFIG, create_run_dir, lock_run, new_run_dir, runs_root, write_run
from vlactl.launch.supervise import LOGS, supervise
from vlactl.report.atomic import check_writable, write_json
from vlactl.rollout.episodes import Pair, select_pairs

EVALS_ROOT = Path("evals")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be measured.

    Attributes:
        config: how.
        policy: with which weights: "label" for people, "checkpoint" ("" = those that the
            configuration names), "step" of its run.
        episodes: which: "tasks", "trials" (None = all) and "passes".
        num_episodes: how many these are.
        extent: the same in words.
    """

    config: RunConfig
    policy: dict[str, Any]
    episodes: dict[str, Any]
    num_episodes: int
    extent: str

    @property
    def suite(self) -> str:
        """The environment's suite with its perturbation, where it has these; else its name."""
        return suite_of(self.config.env)

    def default_folder(self) -> Path:
        """A new folder named by suite and time."""
        return new_run_dir(EVALS_ROOT, self.suite)


def find_request(
    *,
    suite: str | None,
    tasks: str | None,
    trials: int | Literal["all"] | None,
    passes: int,
    checkpoint: Path | None,
    preset: str | None,
    greedy: bool | None,
    overrides: Sequence[str],
    runs_dir: Path | None,
    perturbation: str | None = None,
    step: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
) -> Request:
    """Find the policy and the episodes.

    Raises:
        UserError: a policy, suite, perturbation, task or trial does not exist, or a file is
            damaged.
    """
    is_sampled = temperature is not None or top_k is not None
    if greedy and is_sampled:
        raise ConfigError(
            "--greedy takes the most likely tokens: --temperature and --top-k mean nothing then",
            hint="leave out one or the other",
        )
    options = {
        (SUITE, "env.suite"): suite,
        ("--perturbation", "env.perturbation"): perturbation,
        ("--tasks", "rollout.tasks"): tasks,
        ("--greedy", "eval.greedy"): "true" if greedy else None,
        ("--sampled", "eval.greedy"): "false" if greedy is False or is_sampled else None,
        ("--temperature", "eval.temperature"): temperature,
        ("--top-k", "eval.top_k"): top_k,
    }
    wanted = _as_layers(options)
    source = find_policy(checkpoint, preset, runs_root(runs_dir), [*wanted, *overrides], step)
    config = with_absolute_paths(source.config)
    # The tasks that a run was trained on do not limit what it is measured on in a named suite.
    is_suite_named = suite is not None or perturbation is not None
    chosen = None if is_suite_named and tasks is None else config.rollout.tasks
    offered = environment_spec(config).tasks
    first = _first_trials(offered, config.eval.trials, trials)
    pairs = select_pairs(offered, chosen, first, for_evaluation=True)
    return Request(
        config=config,
        policy={"label": source.label, "checkpoint": source.checkpoint, "step": source.step},
        episodes={
            "tasks": chosen,
            "trials": None if first is None else list(first),
            "passes": passes,
        },
        num_episodes=len(pairs) * passes,
        extent=_describe(pairs, passes, offered),
    )


def _as_layers(options: Mapping[tuple[str, str], object]) -> list[Tree]:
    """What the options that are short for `--set` say, each under its own name."""
    return [
        parse_override(f"{key}={value}", option)
        for (option, key), value in options.items()
        if value is not None
    ]


def _first_trials(
    tasks: Sequence[Task], offered: Sequence[int] | None, count: int | Literal["all"] | None
) -> Sequence[int] | None:
    """The first `count` of the initial states that evaluations may use; None = the benchmark's."""
    if count == "all":
        return None
    if count is None:
        return offered
    if offered is None:
        offered = range(min(len(task.eval_trials) for task in tasks))
    if count > len(offered):
        raise ConfigError(
            f"--trials {count}: {len(offered)} initial states per task are kept for evaluation",
            hint="ask for fewer, or evaluate on others: --trials all, or --set eval.trials=0-49",
        )
    return offered[:count]


def _describe(pairs: Sequence[Pair], passes: int, offered: Sequence[Task]) -> str:
    """How many episodes, and of what."""
    num_tasks = len({task for task, _ in pairs})
    known = sum(len(task.eval_trials) for task in offered)
    tasks, trials = _count(num_tasks, "task"), len(pairs) / num_tasks
    parts = [f"{len(pairs) * passes}: "]
    if trials.is_integer():
        parts.append(f"{tasks} x {_count(int(trials), 'initial state')}")
    else:
        parts.append(f"{len(pairs)} initial states of {tasks}")
    parts += [f" x {passes} passes"] * (passes > 1)
    parts += [f" (the whole suite: {known})"] * (len(pairs) < known)
    return "".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def measure(
    request: Request,
    out: Path | None,
    gpus: int | None,
    json_file: Path | None,
    *,
    markdown: bool = False,
) -> int:
    """Evaluate, print the table, say where things are; returns the exit code."""
    folder = out or request.default_folder()
    if json_file is not None:
        check_writable(json_file, "--json")
    code = play(request, folder, gpus)
    if code != EXIT_OK:
        print_text(f" not finished; continue with the same command and --out {folder}")
        return code
    summary = read_summary(folder / EVAL_SUMMARY)
    _show(summary, folder, print_markdown if markdown else print_table)
    if json_file is not None:
        write_json(json_file, summary)
    print_text()
    print_table([("results", folder / EVAL_SUMMARY), ("films", f"vlactl video {folder}")])
    return EXIT_OK


def play(request: Request, folder: Path, gpus: int | None) -> int:
    """Play what the folder does not hold yet; returns the exit code.

    Raises:
        UserError: it cannot be started, or it failed.
    """
    config = request.config
    if blockers := policy_blockers(config):
        raise ConfigError("this policy cannot be evaluated:\n" + "\n".join(blockers))
    plan = plan_evaluation(config, detect(), gpus=gpus, num_episodes=request.num_episodes)
    if plan.blockers:
        raise ConfigError("this machine is too small:\n" + "\n".join(plan.blockers))
    check_machine(config, plan)
    _claim(folder, request)
    rows = [
        ("policy", request.policy["label"]),
        ("suite", request.suite),
        ("episodes", request.extent),
        ("horizon", f"{plan.max_episode_steps} control steps"),
        *(("note", line) for line in _notes(request)),
        *(("memory", line) for line in plan.memory),
        ("folder", folder),
    ]
    if played := len(read_results(folder)):
        rows.append(("played", f"{played} episodes are there already"))
    print_table(rows)
    with lock_run(folder) as taken_over:
        if taken_over:
            print_text(f" {taken_over}")
        write_run(folder, config, plan)
        progress = make_progress(print_text, 1, Console())
        return supervise(folder, plan, "eval", config=config, progress=progress)


def _notes(request: Request) -> list[str]:
    if request.episodes["passes"] == 1 or not request.config.eval.greedy:
        return []
    return [
        "greedy passes differ in nothing but what simulators draw by chance, such as poses of "
        "fixtures: they tell little more than one pass"
    ]


def _claim(folder: Path, request: Request) -> None:
    """Make the folder, or check that it belongs to the same evaluation."""
    asked = json.loads(json.dumps({**request.episodes, "policy": request.policy}))
    if not (folder / EVAL_REQUEST).is_file():
        create_run_dir(folder, way_out="choose another --out")
        command = shlex.join(["vlactl", *sys.argv[1:]])
        write_json(folder / EVAL_REQUEST, {"command": command, **asked})
        write_json(folder / CONFIG, dump(request.config))
        return
    before = _told_apart_by(read_request(folder))
    wanted = _told_apart_by(asked)
    differing = [
        f"{key}: {render(before.get(key))} there, {render(wanted.get(key))} here"
        for key in sorted({*before, *wanted})
        if before.get(key) != wanted.get(key)
    ]
    differing += [
        f"{change.key}: {render(change.before)} there, {render(change.after)} here"
        for change in diff(load_resolved(folder / CONFIG), request.config)
    ]
    if differing:
        raise ConfigError(
            "\n".join([f"{folder} holds another evaluation:", *differing]),
            hint="continue it with the options it was started with, or choose another --out",
        )


def _told_apart_by(request: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a request another one, by key: not how its command and its policy were typed."""
    episodes = {key: each for key, each in request.items() if key not in ("command", "policy")}
    policy = {f"policy.{key}": each for key, each in request["policy"].items() if key != "label"}
    return episodes | policy


def _show(summary: dict[str, Any], folder: Path, print_rows: Callable[..., None]) -> None:
    passes = f", {summary['passes']} passes" if summary["passes"] > 1 else ""
    print_text(f"\n success rate, {describe_mode(summary)}{passes}\n")
    print_rows(table(summary), TABLE_HEADER)
    if redone := summary[REDONE_EPISODES]:
        episodes = "1 episode was" if redone == 1 else f"{redone} episodes were"
        print_text(f"\n {episodes} played again after a simulator failed: see {folder / LOGS}")
