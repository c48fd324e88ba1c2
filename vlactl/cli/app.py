"""The `vlactl` command: registers the subcommands and turns exceptions into exit codes."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import typer

from vlactl import __version__
from vlactl.cli import (
    bench,
    demos,
    doctor,
    download,
    evaluate,
    export,
    plugins,
    presets,
    report,
    sft,
    train,
    video,
)
from vlactl.cli.output import print_error, print_text
from vlactl.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, UserError

EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_UNREAD = 128 + signal.SIGPIPE
START_HERE = """Start here:
  vlactl doctor                                      is this machine ready?
  vlactl presets list                                what can be trained
  vlactl download                                    published models to start from
  vlactl train --preset libero_spatial_tiny_grpo     train on real LIBERO, on a CPU, in minutes
  vlactl eval --suite libero-spatial --trials 2      measure the newest run
  vlactl video --failed                              watch where it fails
  vlactl report                                      all about the newest run, in one page"""

app = typer.Typer(
    name="vlactl",
    help="Teach vision-language-action models by reinforcement learning in simulation.",
    epilog="Every command explains itself: vlactl COMMAND --help",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("video")(video.video)
app.command("demos")(demos.demos)
app.command("sft")(sft.sft)
app.command("report")(report.report)
app.command("export")(export.export)
app.command("download")(download.download)
app.command("doctor")(doctor.doctor)
app.add_typer(presets.app, name="presets")
app.add_typer(plugins.app, name="plugins")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print_text(f"vlactl {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Teach vision-language-action models by reinforcement learning in simulation."""
    if context.invoked_subcommand is None:
        print_text(context.get_help())
        print_text(START_HERE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; the console script's entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # so that blocks end
    try:
        return _run(arguments)
    except BrokenPipeError as error:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            return _report_bug(error)
        for stream in unread:  # Python writes what is left when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_UNREAD


def _run(arguments: list[str] | None) -> int:
    try:
        app(arguments, standalone_mode=True)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer has made an exit of it
            raise stop.__context__ from None
        if stop.__context__ and isinstance(stop.__context__.__cause__, KeyboardInterrupt):
            print_error("interrupted")
        return stop.code if isinstance(stop.code, int) else EXIT_BUG
    except UserError as error:
        print_error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print_error(f"{error.strerror or error}{where}", "choose a place that can be written to")
        return EXIT_USAGE
    except Exception as error:
        return _report_bug(error)
    return 0


def _is_unread(stream: TextIO | None) -> bool:
    """Whether a standard stream is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    with suppress(OSError, ValueError, AttributeError):  # closed, or no file
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
    return bool(poll.poll(0))


def _report_bug(error: Exception) -> int:
    print_error(
        f"this is a bug in vlactl: {type(error).__name__}: {error}",
        f"traceback: {_save_traceback()}",
    )
    return EXIT_BUG


def _save_traceback() -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix="vlactl-traceback-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"vlactl {__version__}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}")
    return Path(file.name)


if __name__ == "__main__":
    sys.exit(main())
