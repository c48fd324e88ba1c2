"""The command as a whole: what it imports, what it says without arguments, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vlactl.cli.app import main

HEAVY = (
    "torch",
    "transformers",
    "mujoco",
    "gymnasium",
    "timm",
    "tensorboard",
    "matplotlib",
    "wandb",
    "swanlab",
    "trackio",
    "vlactl_libero.core",
)
COMMANDS = [
    (),
    ("train",),
    ("eval",),
    ("video",),
    ("demos",),
    ("sft",),
    ("report",),
    ("export",),
    ("download",),
    ("bench",),
    ("doctor",),
    ("presets",),
    ("presets", "list"),
    ("presets", "show"),
    ("presets", "diff"),
    ("presets", "schema"),
    ("plugins",),
    ("plugins", "list"),
    ("plugins", "check"),
    ("plugins", "new"),
]
PLAIN = {"NO_COLOR": "1", "COLUMNS": "40", "LC_ALL": "C", "PYTHONUTF8": "0"}


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "vlactl.cli.app", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_the_command_line_imports_nothing_heavy():
    probe = (
        "import sys; from vlactl.cli.app import main;"
        "codes = [main(c.split()) for c in ('presets show libero_10_grpo', 'plugins list')];"
        f"print(codes, [m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.strip() == "[0, 0] []"


def test_no_command_teaches_where_to_start(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "Start here:" in output
    assert "vlactl train --preset libero_spatial_tiny_grpo" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([*command, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Usage:")
    assert "\\b" not in output
    assert "--help" in output
    assert output.isascii()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--version"], 0, "vlactl "),
        (["presets", "show", "toy_grpo"], 0, "env.name"),
        (["presets", "show", "nope"], 2, "error: unknown preset"),
        (["presets", "show", "toy_grpo", "--set", "optim.lr=abc"], 2, "wanted a valid number"),
        (["presets", "show", "toy_grpo", "--format", "yaml"], 2, "yaml"),
        (["presets", "show"], 2, "Missing argument"),
        (["nonsense"], 2, "nonsense"),
        (["plugins", "check", "nope"], 2, "no plugin is called"),
    ],
)
def test_exit_codes(arguments, code, expected, capsys):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert expected in captured.out + captured.err
    assert "Traceback" not in captured.out + captured.err


def test_a_bug_saves_its_traceback(monkeypatch, capsys):
    def broken(**_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("importlib.metadata.entry_points", broken)
    assert main(["presets", "list"]) == 1
    error = capsys.readouterr().err
    assert "this is a bug in vlactl: ZeroDivisionError: oops" in error
    path = error.rpartition("traceback: ")[2].strip()
    with open(path, encoding="utf-8") as file:
        assert "ZeroDivisionError" in file.read()
    os.remove(path)


@pytest.mark.parametrize(
    ("arguments", "unread"),
    [
        (("presets", "list"), "stdout"),
        (("--help",), "stdout"),
        (("presets", "show", "nope"), "stderr"),
    ],
)
def test_a_reader_that_leaves_ends_the_command_quietly(arguments, unread, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlactl.cli.app", *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    getattr(process, unread).close()
    heard = process.stderr if unread == "stdout" else process.stdout
    with heard:
        assert heard.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert list(tmp_path.iterdir()) == []


def test_a_broken_pipe_to_anything_else_is_a_bug(monkeypatch, capsys):
    def broken(**_):
        raise BrokenPipeError

    monkeypatch.setattr("importlib.metadata.entry_points", broken)
    assert main(["presets", "list"]) == 1
    error = capsys.readouterr().err
    assert "this is a bug in vlactl: BrokenPipeError" in error
    os.remove(error.rpartition("traceback: ")[2].strip())


@pytest.mark.parametrize(
    "arguments", [(), ("presets", "list"), ("presets", "show", "toy_grpo"), ("plugins", "list")]
)
def test_a_narrow_colourless_terminal_without_unicode(arguments):
    done = run(*arguments, **PLAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_an_error_that_the_terminal_cannot_show_is_still_printed():
    done = run("presets", "show", "n\u00f6", **PLAIN)
    assert done.returncode == 2
    assert b"unknown preset" in done.stderr
    assert done.stderr.isascii()
    assert b"\x1b" not in done.stderr
