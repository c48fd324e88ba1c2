"""`vlactl eval`: its options. What they lead to is in `vlactl.cli.evaluating`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlactl.errors import ConfigError


def evaluate(
    suite: Annotated[
        str | None, typer.Option(help="Suite, e.g. libero-spatial; default: the run's own.")
    ] = None,
    perturbation: Annotated[
        str | None,
        typer.Option(
            help="LIBERO-PRO's variant of the suite: lan, object, swap, task, with_mug...; none = "
            "the suite itself; default: as the run."
        ),
    ] = None,
    trials: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Initial states per task: the first N of eval.trials, or all that the suite has; "
            "default: all of eval.trials.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help='Task indices, e.g. "0-3,7"; default: all of --suite, or those of the run.'
        ),
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
        str | None,
        typer.Option(help="Configuration of a model directory; alone: what it starts from."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Of the run: its checkpoint after so many; 0 = before training."),
    ] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--sampled", help="Default: as the preset says.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling; default: as the preset says.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample among the best tokens only; 0 = among all.")
    ] = None,
    passes: Annotated[
        int, typer.Option(min=1, help="Episodes per (task, trial), each with its own noise.")
    ] = 1,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices (CPU ranks without GPUs).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the same folder again continues.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="A B",
            help="Play nothing: by how much B, a finished evaluation, is better than A.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `vlactl train`.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: VLACTL_RUNS, or runs.")
    ] = None,
) -> None:
    """Measure a policy: every (task, trial) once, a table with 95 % intervals, eval.json.

    \b
    Examples:
      vlactl eval --suite libero-spatial --trials 5
      vlactl eval --suite libero-spatial --perturbation swap --greedy
      vlactl eval --suite libero-90 --greedy --run runs/NAME/TIME --step 0 --json before.json
      vlactl eval --suite libero-90 --trials all --temperature 1.6 --passes 2 --out evals/after
      vlactl eval --preset libero_spatial_tiny_grpo --tasks 0,3 --trials 2
      vlactl eval --compare evals/before evals/after
    """  # noqa: D301
    if compare is not None:
        what = [suite, perturbation, tasks, trials, checkpoint, preset, step]
        how = [greedy, temperature, top_k, gpus, out, set_]
        if any(option is not None for option in (*what, *how)) or passes > 1:
            raise ConfigError(
                "--compare plays nothing: it goes with --json and --markdown only",
                hint="vlactl eval --compare A B",
            )
        from vlactl.cli.comparing import compare_evaluations

        compare_evaluations(*compare, json_file, markdown=markdown)
        return
    from vlactl.cli.evaluating import find_request, measure

    request = find_request(
        suite=suite,
        perturbation=perturbation,
        tasks=tasks,
        trials=_trials(trials),
        passes=passes,
        checkpoint=checkpoint,
        preset=preset,
        step=step,
        greedy=greedy,
        temperature=temperature,
        top_k=top_k,
        overrides=set_ or [],
        runs_dir=runs_dir,
    )
    raise typer.Exit(measure(request, out, gpus, json_file, markdown=markdown))


def _trials(text: str | None) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f'--trials {text}: how many initial states per task, or "all"',
            hint="certain ones: --set eval.trials=40-49",
        )
    return int(text)
