"""`vlactl bench`: what a part of vlactl costs on this machine, and is worth next to others."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlactl import __version__
from vlactl.cli.bench_model import bench_model
from vlactl.cli.bench_scaling import bench_scaling
from vlactl.cli.environments import read_section
from vlactl.cli.output import print_table, print_text
from vlactl.errors import EXIT_INTERRUPTED, ConfigError, UserError

if TYPE_CHECKING:
    from vlactl.api.plugins import BenchOptions, BenchReport, EnvironmentConfig, EnvironmentPlugin
    from vlactl.launch.hardware import Hardware

MAX_DEFAULT_ENVS = 16

app = typer.Typer(
    help="Measure how fast this machine simulates, infers and updates.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root() -> None:
    """Measure how fast this machine simulates, infers and updates."""


app.command("model")(bench_model)
app.command("scaling")(bench_scaling)


@app.command("env")
def bench_env(
    suite: Annotated[str | None, typer.Option(help="Default: the environment's own.")] = None,
    num_envs: Annotated[
        int | None, typer.Option(min=1, help="Simulators; default: one per core, at most 16.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Actions per observation.")] = 8,
    cameras: Annotated[int, typer.Option(min=0, help="Cameras to render.")] = 2,
    image_size: Annotated[int | None, typer.Option(help="Height and width of pictures.")] = None,
    renderer: Annotated[str | None, typer.Option(help="auto, egl or osmesa.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Of stepping per turn, after a reset.")
    ] = 3.0,
    episodes: Annotated[
        int | None,
        typer.Option(min=0, help="Scripted episodes to replay; default: 4 per simulator."),
    ] = None,
    horizon: Annotated[
        int, typer.Option(min=1, help="Control steps of an episode in lock-step.")
    ] = 512,
    wave_seconds: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="After which a lock-step wave is extrapolated; its reset comes on top.",
        ),
    ] = 20.0,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure further simulators of a task.")
    ] = True,
    env: Annotated[
        str | None, typer.Option(help="Environment; default: the one that has a benchmark.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="env.KEY=VALUE, as for `vlactl train`.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything that was measured."),
    ] = None,
) -> None:
    """Compare vlactl's simulators with the stock ones, in turns within one run.

    \b
    Examples:
      vlactl bench env
      vlactl bench env --num-envs 2 --image-size 64 --rounds 1 --seconds 1 --json bench.json
    """  # noqa: D301
    from vlactl.api.plugins import BenchOptions
    from vlactl.launch.hardware import detect
    from vlactl.report.atomic import check_writable

    if json_file is not None:
        check_writable(json_file, "--json")  # before the work, not after it
    hardware = detect()
    plugin = _find_plugin(env)
    keys = {
        "--suite": ("suite", suite),
        "--num-envs": ("num_envs", num_envs or min(hardware.cores, MAX_DEFAULT_ENVS)),
        "--image-size": ("image_size", image_size),
        "--renderer": ("renderer", renderer),
    }
    config = read_section(plugin, keys, set_ or [])
    options = BenchOptions(
        cameras=_first_cameras(plugin, config, cameras),
        device_index=0 if hardware.gpus else -1,
        chunk_length=chunk,
        rounds=rounds,
        seconds=seconds,
        episodes=4 * config.num_envs if episodes is None else episodes,
        horizon=horizon,
        wave_seconds=wave_seconds,
        memory=memory,
    )
    _measure(plugin, config, options, hardware, json_file)


def _measure(
    plugin: EnvironmentPlugin,
    config: EnvironmentConfig,
    options: BenchOptions,
    hardware: Hardware,
    json_file: Path | None,
) -> None:
    from vlactl.api import registry
    from vlactl.api.plugins import load_object
    from vlactl.report.atomic import write_json

    if not config.allow_untested_versions:
        registry.require(plugin)
    try:
        report = load_object(plugin.bench)(config, options, _say)
    except KeyboardInterrupt:
        _say("interrupted; nothing is written")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    machine = _describe_machine(hardware)
    if json_file is not None:
        command = ["vlactl", *sys.argv[1:]]
        write_json(json_file, {"command": command, "machine": machine, **report.record})
    print_text(f" {machine['cores']} cores of {machine['cpu']}, {_join(machine['gpus'])}\n")
    print_table(report.rows, report.header)
    print_text()
    for note in report.notes:
        print_text(f" {note}")
    if report.steps_per_second:
        print_text(f" kept for estimates in {_keep(plugin, config, options, hardware, report)}")


def _keep(
    plugin: EnvironmentPlugin,
    config: EnvironmentConfig,
    options: BenchOptions,
    hardware: Hardware,
    report: BenchReport,
) -> Path:
    """Remember how fast this machine simulates, for the estimates of plans."""
    from vlactl.launch.rates import environment_key, store

    record = {
        "measured": datetime.now(tz=UTC).date().isoformat(),
        "steps_per_second": report.steps_per_second,
        "simulators": config.num_envs,
        "cores": hardware.cores,
        "cameras": list(options.cameras),
        "chunk_length": options.chunk_length,
    }
    return store("env", environment_key(hardware.device_name, plugin.name), record)


def _describe_machine(hardware: Hardware) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": hardware.cpu,
        "cores": hardware.cores,
        "ram_bytes": hardware.ram_bytes,
        "gpus": [gpu.name for gpu in hardware.gpus],
        "python": platform.python_version(),
        "vlactl": __version__,
    }


def _join(gpus: Sequence[str]) -> str:
    return ", ".join(gpus) or "no GPU"


def _say(text: str) -> None:
    print_text(f" {text}", file=sys.stderr)


def _find_plugin(name: str | None) -> EnvironmentPlugin:
    """The environment to measure.

    Raises:
        ConfigError: it has no benchmark, or there is not exactly one to choose.
    """
    from vlactl.api import registry

    if name is not None:
        chosen = registry.find("environment", name)
        if not getattr(chosen, "bench", ""):
            raise ConfigError(f'the environment "{name}" has no benchmark', hint=_offer())
        return chosen  # type: ignore[return-value]
    found = list(_with_benchmark())
    if len(found) != 1:
        raise ConfigError("which environment is to be measured?", hint=_offer())
    return found[0]


def _with_benchmark() -> Iterator[EnvironmentPlugin]:
    from vlactl.api import registry
    from vlactl.api.plugins import EnvironmentPlugin

    for name in registry.names("environment"):
        with suppress(UserError):  # a broken plugin is no candidate
            plugin = registry.find("environment", name)
            if isinstance(plugin, EnvironmentPlugin) and plugin.bench:
                yield plugin


def _offer() -> str:
    names = ", ".join(plugin.name for plugin in _with_benchmark())
    return f"environments with a benchmark: {names or 'none'}   (--env NAME)"


def _first_cameras(
    plugin: EnvironmentPlugin, config: EnvironmentConfig, number: int
) -> tuple[str, ...]:
    from vlactl.api.plugins import load_object

    cameras = tuple(load_object(plugin.spec)(config).cameras)
    if number > len(cameras):
        raise ConfigError(f"--cameras {number}: {plugin.name} has {', '.join(cameras)}")
    return cameras[:number]
