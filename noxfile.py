"""Development and demonstration sessions: `nox -l` lists them.

nox -s demo      install everything, train on real LIBERO, measure what ships, make films
nox -s tests     install everything, run all tests that need no GPU
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests", "sinks"]
nox.options.error_on_missing_interpreters = True

SYSTEM_LIBRARIES = {"OSMesa": "libosmesa6", "GL": "libgl1", "glib-2.0": "libglib2.0-0"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DEMO_PRESET = "libero_object_tiny_vla_demo"


@nox.session
def demo(session: nox.Session) -> None:
    """Train on real LIBERO, then measure what ships, before and after RL, and film it."""
    install_system_libraries(session)
    session.install(".[libero]")
    session.run("vlactl", "doctor", "--preset", DEMO_PRESET)
    session.run("vlactl", "train", "--preset", DEMO_PRESET, "--gpus", "1")
    base, rl = (os.path.join("evals", "demo", weights) for weights in ("base", "rl"))
    for folder in (base, rl):
        shutil.rmtree(folder, ignore_errors=True)
        shipped = f"model.shipped={os.path.basename(folder)}"
        session.run("vlactl", "eval", "--preset", DEMO_PRESET, "--set", shipped, "--out", folder)
        session.run("vlactl", "video", folder)
    session.run("vlactl", "eval", "--compare", base, rl)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    install_system_libraries(session)
    install_browser(session)
    session.install("-e", ".[libero,dev]")
    session.run("pytest", *session.posargs)


@nox.session
def sinks(session: nox.Session) -> None:
    """Test the mirrors of metrics with the real libraries, which hold others back: no torch."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    light = ("numpy", "pydantic", "typer", "rich", "psutil", "packaging")
    needed = [each for each in project["dependencies"] if each.partition(">=")[0] in light]
    for extra in ("wandb", "swanlab", "trackio"):
        needed += project["optional-dependencies"][extra]
    session.install("-e", ".", "--no-deps")
    session.install(*needed, "pytest>=8.3", "pytest-timeout>=2.3")
    session.run("pytest", "tests/unit/test_tracking_sinks.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, import rules, and that generated files are up to date."""
    session.install("ruff>=0.9", "import-linter>=2.1")
    session.install("-e", ".", "--no-deps")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Type-check the engine strictly."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it into this session and use it outside the checkout."""
    session.install("build>=1.2")
    session.run("python", "-m", "build", "--wheel", "--outdir", session.create_tmp(), ".")
    (built,) = [name for name in os.listdir(session.create_tmp()) if name.endswith(".whl")]
    session.install(os.path.join(session.create_tmp(), built))
    with session.chdir("/"):
        session.run("vlactl", "presets", "list")
        session.run("vlactl", "plugins", "list")
        runs = os.path.join(session.create_tmp(), "runs")
        session.run(
            "vlactl",
            "train",
            "--preset",
            "toy_grpo",
            "--set",
            "train.max_steps=1",
            "--runs-dir",
            runs,
        )


def install_system_libraries(session: nox.Session) -> None:
    """Install what the CPU renderer needs with apt where that is allowed, else say how."""
    missing = [
        package for name, package in SYSTEM_LIBRARIES.items() if not ctypes.util.find_library(name)
    ]
    if not missing:
        return
    if not apt_install(session, missing):
        session.error(
            f"system libraries are missing; run:  sudo apt-get install {' '.join(missing)}"
        )


def install_browser(session: nox.Session) -> None:
    """Install the browser that reports are looked at with; without one those tests are skipped."""
    if not any(map(shutil.which, BROWSERS)) and not apt_install(session, ["chromium"]):
        session.warn("no browser: the tests that look at a report in one will be skipped")


def apt_install(session: nox.Session, packages: list[str]) -> bool:
    """Install Debian packages where that is allowed; returns whether they are there now."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    command = [*prefix, "apt-get", "install", "-y", "--no-install-recommends", *packages]
    may_install = shutil.which("apt-get") and (
        not prefix or subprocess.run(["/usr/bin/sudo", "-n", "true"], check=False).returncode == 0
    )
    if not may_install:
        return False
    try:
        session.run(*prefix, "apt-get", "update", external=True)
        session.run(*command, external=True)
    except nox.command.CommandFailed:
        return False
    return True
