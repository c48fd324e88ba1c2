"""From the options of `vlactl video` to films: which episodes, played again and filmed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from vlactl.api import registry
from vlactl.api.contracts import EnvContext, Environment
from vlactl.cli.evaluating import EVALS_ROOT, find_request, play
from vlactl.cli.output import print_text
from vlactl.config.compose import load_resolved, override
from vlactl.config.run import RunConfig, read_indices
from vlactl.errors import EXIT_OK, ConfigError
from vlactl.evaluate.films import GRID_NAME, Film, choose, find_recordings, make_films
from vlactl.evaluate.results import EpisodeResult, read_results
from vlactl.launch.hardware import detect
from vlactl.launch.rundir import CONFIG, runs_root

VIDEOS_ROOT = Path("videos")


def play_new(
    *,
    suite: str | None,
    tasks: str | None,
    trials: int,
    checkpoint: Path | None,
    preset: str | None,
    greedy: bool | None,
    overrides: Sequence[str],
    runs_dir: Path | None,
) -> Path:
    """Play new episodes, as an evaluation; returns its folder.

    Raises:
        typer.Exit: it was interrupted.
        UserError: it cannot be started, or it failed.
    """
    request = find_request(
        suite=suite,
        tasks=tasks,
        trials=trials,
        passes=1,
        checkpoint=checkpoint,
        preset=preset,
        greedy=greedy,
        overrides=overrides,
        runs_dir=runs_dir,
    )
    folder = request.default_folder()
    code = play(request, folder, None)
    if code != EXIT_OK:
        raise typer.Exit(code)
    return folder


def newest_recording(runs_dir: Path | None) -> Path:
    """The run or evaluation that was started last and has recorded episodes."""
    roots = (runs_root(runs_dir), EVALS_ROOT)
    found = [path.parent for root in roots for path in root.glob(f"*/*/{CONFIG}")]
    for folder in sorted(found, key=lambda path: path.name, reverse=True):
        if any(read_results(path.parent) for path in folder.rglob("episodes*.jsonl")):
            return folder
    raise ConfigError(
        "there is no run or evaluation with recorded episodes here",
        hint="record some: vlactl eval --preset libero_spatial_tiny_grpo --tasks 0 --trials 1\n"
        "or name one: vlactl video RUN_OR_EVALUATION",
    )


def film(
    source: Path,
    *,
    out: Path | None,
    tasks: str | None,
    success: bool | None,
    limit: int,
    size: int,
    overrides: Sequence[str],
) -> None:
    """Film the wanted ones of the recorded episodes.

    Raises:
        UserError: none is wanted, or there is no simulator or encoder.
    """
    recordings = find_recordings(source)
    recorded = read_results(recordings)
    wanted = None if tasks is None else read_indices(tasks)
    results = choose(recorded, tasks=wanted, success=success, limit=limit)
    if not results:
        raise _none_wanted(recordings, recorded)
    folder = out or VIDEOS_ROOT / _film_folder(_home_of(recordings), recordings)
    print_text(f" filming {len(results)} of {len(recorded)} episodes of {recordings}")
    films = play_again(recordings, results, folder, size=size, overrides=overrides)
    for each in films:
        note = "" if each.faithful else "   (played again it ended differently)"
        print_text(f" {each.path}{note}")
    if len(films) > 1:
        print_text(f" {folder / GRID_NAME}")


def play_again(
    recordings: Path,
    results: Sequence[EpisodeResult],
    folder: Path,
    *,
    size: int,
    overrides: Sequence[str] = (),
) -> list[Film]:
    """Films of recorded episodes, written to a folder, and a grid of them where there are several.

    Raises:
        UserError: there is no simulator or encoder, or the recordings are damaged.
    """
    num_slots = min(len(results), detect().cores)
    config = override(load_resolved(_home_of(recordings) / CONFIG), overrides)
    folder.mkdir(parents=True, exist_ok=True)  # before simulators start, not after
    env = _filming_environment(config, size, num_slots)
    try:
        return make_films(env, num_slots, recordings, results, folder, _tell)
    finally:
        env.close()


def _none_wanted(recordings: Path, recorded: Sequence[EpisodeResult]) -> ConfigError:
    tasks = ", ".join(map(str, sorted({result.task for result in recorded})))
    failures = sum(not result.success for result in recorded)
    return ConfigError(
        f"none of the {len(recorded)} episodes in {recordings} is wanted",
        hint=f"recorded: tasks {tasks}; {failures} failures, {len(recorded) - failures} successes",
    )


def _tell(done: int, total: int) -> None:
    print_text(f" film {done}/{total}")


def _home_of(recordings: Path) -> Path:
    """The run or evaluation that recorded episodes belong to."""
    resolved = recordings.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / CONFIG).is_file():
            return folder
    raise ConfigError(f"{recordings} is not part of a run or an evaluation: no {CONFIG} above it")


def _film_folder(home: Path, recordings: Path) -> str:
    """A name that tells runs, evaluations and steps apart."""
    step = recordings.resolve().relative_to(home).parts
    return "_".join([home.parent.name, home.name, *step])


def _filming_environment(config: RunConfig, size: int, num_slots: int) -> Environment:
    """Simulators that render every step, in pictures of at least `size` pixels where they can."""
    env_config = config.env
    if size > getattr(env_config, "image_size", size):
        env_config = env_config.model_copy(update={"image_size": size})
    context = EnvContext(
        num_slots=num_slots,
        cameras=config.model.cameras[:1],
        device_index=0 if detect().gpus else -1,
        render_every_step=True,
    )
    plugin = registry.find("environment", config.env.name)
    env: Environment = registry.load_factory(plugin)(env_config, context)
    return env
