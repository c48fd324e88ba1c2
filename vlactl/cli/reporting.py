"""From a run directory to one page: what the run is, how it went, what it ran on, films."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from vlactl import __version__
from vlactl.cli.environments import suite_of
from vlactl.cli.filming import play_again
from vlactl.cli.output import print_table, print_text
from vlactl.cli.report_charts import (
    EPISODES,
    STEP_SECONDS,
    Line,
    steps_of,
    success_section,
    time_section,
    training_rate,
    update_section,
)
from vlactl.cli.report_evals import Measured, before_after, choose, measured, measured_by
from vlactl.config.compose import compose, diff, flatten, load_resolved
from vlactl.config.explain import render
from vlactl.config.run import RunConfig
from vlactl.errors import ConfigError, IntegrityError, UserError
from vlactl.evaluate.films import find_recordings
from vlactl.evaluate.results import EpisodeResult, read_results
from vlactl.hub.manifest import list_checkpoints
from vlactl.launch.hardware import readable
from vlactl.launch.plan import Plan
from vlactl.launch.rundir import (
    CONFIG,
    PROVENANCE,
    newest_run,
    owner_of,
    preset_of,
    read_machine,
    read_run,
    runs_root,
)
from vlactl.launch.status import read_failures, read_result
from vlactl.launch.supervise import LOGS
from vlactl.report.atomic import check_writable
from vlactl.report.html import Clip, Page, Section, Table, Tile, write_page
from vlactl.report.sinks import FILE_NAME, read_metrics

PAGE = "report.html"
FILM_PIXELS = 256
_OF_THE_FILE = frozenset({"summary", "run_name"})


def find_run(named: Path | None, runs_dir: Path | None) -> Path:
    """The run that a person means, or else the newest.

    Raises:
        ConfigError: there is none, or it is no run of training.
    """
    root = runs_root(runs_dir)
    run = named or newest_run(root)
    if run is None:
        raise ConfigError(f"no runs in {root}", hint="start one: vlactl train --preset NAME")
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} is not a run: it has no {CONFIG}")
    if not (run / PROVENANCE).is_file() and not read_metrics(run):
        raise ConfigError(
            f"{run} is not a run of training", hint="to show an evaluation: --after DIR"
        )
    if load_resolved(run / CONFIG).sft.data:
        raise ConfigError(
            f"{run} is a supervised run; a report is about reinforcement learning",
            hint=f"its curves: {run / FILE_NAME}, tensorboard --logdir {run}\n"
            "where it was the start of one: vlactl report RUN",
        )
    return run


def write_report(
    run: Path, *, out: Path | None, before: Path | None, after: Path | None, films: int
) -> None:
    """Write the page of a run and say where it is.

    Raises:
        UserError: an evaluation that was named does not exist, or a file is damaged.
    """
    place = out or run / PAGE
    check_writable(place, "--out")
    config, plan = read_run(run)
    lines = read_metrics(run)
    own = measured_by(run)
    named = [measured(path) if path else None for path in (before, after)]
    shown = choose(own, *named)
    tiles, compared = before_after(shown, config)
    with tempfile.TemporaryDirectory(prefix="vlactl-report-") as folder:
        sections = [
            *_sections(lines, own, config),
            compared,
            _film_section(run, shown.after, films, Path(folder)),
            _configuration(run, config),
            _machine(run, plan),
        ]
        sections.sort(key=lambda section: _ORDER.index(section.title.split()[0]))
        state, good, note = _state(run, lines, config)
        page = Page(
            title=f"{config.run_name}, {run.resolve().name}",
            summary=config.summary,
            state=state,
            good=good,
            state_note=note,
            facts=_facts(run, lines, config, plan),
            tiles=[*tiles, *_last_step(lines, config)],
            sections=sections,
            made_by=f"Made by vlactl {__version__} on {_time(datetime.now().timestamp())}. "
            "This file needs no network and runs no script.",
        )
        write_page(place, page)
    print_table([("report", f"{place}   {readable(place.stat().st_size)}")])


_ORDER = ("Success", "Before", "Films", "Update", "Time", "Configuration", "Machine")


def _sections(lines: Sequence[Line], own: Sequence[Measured], config: RunConfig) -> list[Section]:
    """What metrics show; nothing before the first step."""
    steps = steps_of(lines)
    if not steps:
        return [Section(title="Success", text=["No step has been finished."])]
    rated = [(each.done or 0, each.mode, each.total) for each in own]
    known = [(done, mode, rate) for done, mode, rate in rated if rate]
    return [
        success_section(steps, known, config),
        update_section(steps, config),
        time_section(lines),
    ]


# --------------------------------------------------------------------------------------------
# The head of the page
# --------------------------------------------------------------------------------------------
def _state(run: Path, lines: Sequence[Line], config: RunConfig) -> tuple[str, bool, str]:
    """In a word, whether that is well, and how far it came."""
    done = max((line["step"] + 1 for line in steps_of(lines)), default=0)
    reached = f"{done} of {config.train.max_steps} steps"
    if owner := owner_of(run):
        return "running", True, f"{reached} when this page was made; {owner}"
    result = read_result(run)
    if result == "finished":
        return "finished", True, reached
    if result:
        return "stopped", True, f"as asked, after {reached}; vlactl train --resume goes on"
    for failure in read_failures(run)[:1]:
        where = f"rank {failure.rank}, {failure.phase} of step {failure.step + 1}"
        return "failed", False, f"after {reached} ({where}): {failure.message}"
    return "interrupted", False, f"after {reached}"


def _facts(
    run: Path, lines: Sequence[Line], config: RunConfig, plan: Plan
) -> list[tuple[str, str]]:
    env, steps = config.env, steps_of(lines)
    suite = suite_of(env)
    facts = [
        ("folder", str(run)),
        ("preset", preset_of(run) or "unknown"),
        ("environment", env.name if suite == env.name else f"{env.name}, {suite}"),
        ("model", config.model.name + (f", LoRA {config.lora.rank}" if config.lora.rank else "")),
        ("algorithm", f"{config.algorithm.name}, groups of {config.algorithm.group_size}"),
        (
            "ran on",
            f"{_count(plan.world_size, 'rank')} ({plan.device}), {_count(plan.nodes, 'machine')}",
        ),
    ]
    starts = len(list((run / LOGS).glob("attempt-*")))
    again = _count(starts - 1, "restart or resumption", "restarts or resumptions")
    facts.append(("starts", f"{starts}, of which {again}" if starts > 1 else f"{starts}"))
    if steps:
        facts += _history(steps, lines)
    checkpoints = list_checkpoints(run)
    facts.append(("last checkpoint", checkpoints[-1][1].name if checkpoints else "none"))
    return facts


def _history(steps: Sequence[Line], lines: Sequence[Line]) -> list[tuple[str, str]]:
    begin, end = steps[0]["time"] - steps[0][STEP_SECONDS], lines[-1]["time"]
    in_steps = timedelta(seconds=round(sum(line[STEP_SECONDS] for line in steps)))
    wall = timedelta(seconds=round(end - begin))
    redone = sum(line.get("env/restarts") or 0 for line in steps)
    dropped = sum(line.get("env/dropped_groups") or 0 for line in steps)
    return [
        ("time", f"{_time(begin)} to {_time(end)}: {wall}, of which {in_steps} in steps"),
        ("episodes", f"{sum(line.get(EPISODES) or 0 for line in steps):.0f} in training"),
        ("simulators", f"{redone:.0f} episodes redone after failures, {dropped:.0f} groups lost"),
    ]


def _last_step(lines: Sequence[Line], config: RunConfig) -> list[Tile]:
    """Success of training episodes at the end."""
    for line in reversed(steps_of(lines)):
        if rate := training_rate(line, config):
            note = f"step {line['step'] + 1}, 95 %: {rate.low:.1%} to {rate.high:.1%}"
            return [Tile(label="Last training step", value=f"{rate.value:.1%}", note=note)]
    return []


def _count(number: int, word: str, several: str = "") -> str:
    return f"{number} {word if number == 1 else several or word + 's'}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


# --------------------------------------------------------------------------------------------
# Films
# --------------------------------------------------------------------------------------------
def _film_section(run: Path, last: Measured | None, limit: int, folder: Path) -> Section:
    """Films, or why there are none: a report does without."""
    if limit == 0:
        return Section(title="Films", text=["None were asked for."])
    try:
        recordings = last.folder if last else find_recordings(run)
        chosen = mixed(read_results(recordings), limit)
        print_text(f" filming {len(chosen)} episodes of {recordings}")
        films = play_again(recordings, chosen, folder, size=FILM_PIXELS)
    except UserError as error:
        return Section(title="Films", text=[f"They could not be made here. {error.message}"])
    instructions = last.instructions if last else {}
    clips = [
        Clip(
            title=_film_title(film.result, instructions.get(film.result.task, "")),
            success=film.result.success,
            note="" if film.faithful else "Played again here, it ended differently.",
            path=film.path,
        )
        for film in sorted(films, key=lambda film: film.result.key)
    ]
    text = (
        f"Episodes of {recordings.name}, played again from their recorded actions: as many "
        "failures as successes where there are enough, so not a fair sample."
    )
    return Section(title="Films", text=[text], clips=clips)


def _film_title(result: EpisodeResult, instruction: str) -> str:
    number = f", number {result.repeat}" if result.repeat else ""
    place = f"task {result.task}, initial state {result.trial}{number}, {result.num_steps} steps"
    return f"{instruction} ({place})" if instruction else place


def mixed(results: Sequence[EpisodeResult], limit: int) -> list[EpisodeResult]:
    """Failures and successes, half of each where there are enough, of as many tasks as possible."""
    failures, successes = (
        _tasks_in_turn([result for result in results if result.success == success])
        for success in (False, True)
    )
    num_failures = min(len(failures), max(math.ceil(limit / 2), limit - len(successes)))
    return [*failures[:num_failures], *successes[: limit - num_failures]]


def _tasks_in_turn(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    seen: dict[int, int] = {}
    rounds = []
    for result in results:
        seen[result.task] = seen.get(result.task, 0) + 1
        rounds.append((seen[result.task], result.task, result))
    return [result for _, _, result in sorted(rounds, key=lambda entry: entry[:2])]


# --------------------------------------------------------------------------------------------
# Configuration and machine
# --------------------------------------------------------------------------------------------
def _configuration(run: Path, config: RunConfig) -> Section:
    origins = _read(run / PROVENANCE)
    everything = Table(
        caption="The whole configuration",
        header=("key", "value", "from"),
        rows=[
            (key, render(value), str(origins.get(key, "")))
            for key, value in flatten(config).items()
        ],
        words=frozenset({0, 1, 2}),
    )
    text, tables = _against_preset(run, config, origins)
    return Section(title="Configuration", text=[text], tables=tables, folded=[everything])


def _against_preset(
    run: Path, config: RunConfig, origins: Mapping[str, Any]
) -> tuple[str, list[Table]]:
    """What differs from the preset as it is now."""
    preset = preset_of(run)
    try:
        changes = diff(compose(preset).config, config) if preset else None
    except UserError as error:
        return f"It cannot be compared with the preset {preset}: {error.message}", []
    if changes is None:
        return "The preset of the run is unknown.", []
    rows = [
        (
            change.key,
            "-" if change.sign == "+" else render(change.before),
            "-" if change.sign == "-" else render(change.after),
            _why(str(origins.get(change.key, ""))),
        )
        for change in changes
        if change.key not in _OF_THE_FILE
    ]
    if not rows:
        return f"As the preset {preset} says.", []
    header = ("key", "preset", "run", "from")
    caption = f"What differs from the preset {preset}"
    return "", [Table(caption=caption, header=header, rows=rows, words=frozenset({0, 1, 2, 3}))]


def _why(origin: str) -> str:
    is_of_preset = origin == "default" or origin.rpartition(":")[2].isdigit()
    return "a resumption, or the preset has changed" if is_of_preset else origin


def _machine(run: Path, plan: Plan) -> Section:
    machine = read_machine(run)
    rows = list((machine.versions if machine else _versions_of_evaluations(run)).items())
    if machine:
        hardware = machine.hardware
        rows += [
            ("processor", f"{hardware.cpu}, {hardware.cores} cores"),
            ("memory", readable(hardware.ram_bytes)),
            *(("GPU", f"{gpu.name}, {readable(gpu.memory_bytes)}") for gpu in hardware.gpus),
        ]
    rows += [("plan", line) for line in (*plan.memory, *plan.seconds, *plan.notes)]
    text = [] if machine else ["The run did not record its machine; versions are its evaluations'."]
    table = Table(caption="Of the last start", header=("", ""), rows=rows, words=frozenset({0, 1}))
    return Section(title="Machine", text=text, tables=[table] if rows else [])


def _versions_of_evaluations(run: Path) -> dict[str, str]:
    own = measured_by(run)
    return dict(own[-1].evaluation.summary["versions"]) if own else {}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object that a run keeps, {} where there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{path} is damaged: it holds no JSON object")
    return value
