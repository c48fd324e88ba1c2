"""`vlactl video`: films of episodes that a run or an evaluation has recorded, or of new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlactl.cli.evaluate import EVALS_ROOT, EvalRequest, run_evaluation
from vlactl.cli.output import print_text
from vlactl.errors import ConfigError

VIDEOS_ROOT = Path("videos")


def video(
    source: Annotated[
        Path | None, typer.Argument(help="Run or evaluation; default: the newest of both.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The same as SOURCE.")] = None,
    tasks: Annotated[str | None, typer.Option("--task", "--tasks", help='Tasks, e.g. "5".')] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Failures only.")] = False,
    succeeded: Annotated[bool, typer.Option("--succeeded", help="Successes only.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Films at most.")] = 9,
    size: Annotated[int, typer.Option(min=64, max=1024, help="Pixels of a side.")] = 256,
    suite: Annotated[str | None, typer.Option(help="Play new episodes of this suite.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="New episodes per task.")] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", "--model", help="Policy of new episodes.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Policy of new episodes, untrained.")] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--sampled", help="How new episodes are played.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the films.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE.")] = None,
    runs_dir: Annotated[
        Path | None, typer.Option(help="Folder of all runs; default: ./runs.")
    ] = None,
) -> None:
    """Make films: one MP4 per episode, named by task and outcome, and a grid of all.

    Recorded episodes are played again action by action, so any of them can be filmed afterwards.

    Examples:
      vlactl video                                           the newest run or evaluation
      vlactl video --run runs/NAME/TIME --task 5 --failed
      vlactl video --suite libero-spatial --task 3 --trials 2 --checkpoint runs/NAME/TIME
    """
    if failed and succeeded:
        raise ConfigError(
            "--failed and --succeeded exclude each other", hint="give neither for both"
        )
    if source is not None and run is not None:
        raise ConfigError("SOURCE and --run name the same thing: give one of them")
    if suite is not None or checkpoint is not None or preset is not None:
        request = EvalRequest.resolve(
            suite=suite,
            tasks=tasks,
            trials=trials,
            repeats=1,
            checkpoint=checkpoint,
            preset=preset,
            greedy=greedy,
            overrides=set_ or [],
            runs_dir=runs_dir,
        )
        folder = request.default_folder(EVALS_ROOT)
        run_evaluation(request, folder, None)
    else:
        folder = source or run or newest_recording(runs_dir)
    _film(
        folder,
        out=out,
        tasks=_task_indices(tasks),
        success=True if succeeded else False if failed else None,
        limit=limit,
        size=size,
    )


def newest_recording(runs_dir: Path | None) -> Path:
    """The run or evaluation that was started last and has recorded episodes."""
    from vlactl.evaluate.results import read_results
    from vlactl.launch.rundir import CONFIG, runs_root

    found = [
        path.parent
        for root in (runs_root(runs_dir), EVALS_ROOT)
        for path in root.glob(f"*/*/{CONFIG}")
    ]
    for folder in sorted(found, key=lambda path: path.name, reverse=True):
        if any(read_results(path.parent) for path in folder.rglob("episodes*.jsonl")):
            return folder
    raise ConfigError(
        "there is no run or evaluation with recorded episodes here",
        hint="record some: vlactl eval --preset libero_spatial_tiny_grpo --tasks 0 --trials 1\n"
        "or name one: vlactl video RUN_OR_EVALUATION",
    )


def _task_indices(tasks: str | None) -> tuple[int, ...] | None:
    from vlactl.config.run import RolloutConfig

    return None if tasks is None else RolloutConfig.model_validate({"tasks": tasks}).tasks


def _film(
    source: Path,
    *,
    out: Path | None,
    tasks: tuple[int, ...] | None,
    success: bool | None,
    limit: int,
    size: int,
) -> None:
    from vlactl.evaluate.films import choose, find_recordings, make_films
    from vlactl.evaluate.results import read_results

    recordings = find_recordings(source)
    recorded = read_results(recordings)
    results = choose(recorded, tasks=tasks, success=success, limit=limit)
    if not results:
        raise ConfigError(
            f"none of the {len(recorded)} episodes in {recordings} is wanted",
            hint="leave out --task, --failed or --succeeded",
        )
    folder = out or VIDEOS_ROOT / "_".join(recordings.resolve().parts[-2:])
    config = _config_above(recordings)
    num_slots = min(len(results), _num_cores())
    env = _filming_environment(config, size, num_slots)
    print_text(f" filming {len(results)} of {len(recorded)} episodes of {recordings}")
    try:
        films = make_films(env, num_slots, recordings, results, folder, _tell)
    finally:
        env.close()
    for film in films:
        note = "" if film.faithful else "   (played again it ended differently)"
        print_text(f" {film.path}{note}")
    if len(films) > 1:
        print_text(f" {folder / 'grid.mp4'}")


def _tell(done: int, total: int) -> None:
    print_text(f" film {done}/{total}")


def _config_above(recordings: Path) -> Any:
    from vlactl.config.compose import load_resolved
    from vlactl.launch.rundir import CONFIG

    resolved = recordings.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / CONFIG).is_file():
            return load_resolved(folder / CONFIG)
    raise ConfigError(f"{recordings} is not part of a run or an evaluation: no {CONFIG} above it")


def _filming_environment(config: Any, size: int, num_slots: int) -> Any:
    from vlactl.api import registry
    from vlactl.api.contracts import EnvContext
    from vlactl.launch.hardware import detect

    plugin = registry.find("environment", config.env.name)
    registry.require(plugin)
    env_config = config.env
    if "image_size" in type(env_config).model_fields and size > env_config.image_size:
        env_config = env_config.model_copy(update={"image_size": size})
    context = EnvContext(
        num_slots=num_slots,
        cameras=config.model.cameras[:1],
        device_index=0 if detect().gpus else -1,
        render_every_step=True,
    )
    return registry.load_factory(plugin)(env_config, context)


def _num_cores() -> int:
    from vlactl.launch.hardware import detect

    return max(1, detect().cores)
