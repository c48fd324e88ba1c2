"""Keeps LIBERO and robosuite from talking: they print while they are imported and built.

robosuite also writes /tmp/robosuite.log, which fails for the second user of a machine, and MuJoCo
writes MUJOCO_LOG.TXT into the current folder. Neither happens here.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
FATAL_EXIT_CODE = 70


@contextlib.contextmanager
def stdout() -> Iterator[None]:
    """Drop what is printed inside."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Import robosuite and LIBERO inside: no prints, warnings or log files."""
    _disable_robosuite_logs()
    with stdout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def warn(message: str) -> None:
    """Receives MuJoCo's warnings, such as an unstable simulation, which MuJoCo then resets."""
    logger.warning("MuJoCo: %s", message.strip())


def on_fatal_error(library: ctypes.CDLL) -> None:
    """End the process with a message when MuJoCo gives up.

    Called through Python's bindings MuJoCo raises instead. Without this it would write a log file.
    """
    ctypes.c_void_p.in_dll(library, "mju_user_error").value = ctypes.cast(
        _FATAL, ctypes.c_void_p
    ).value


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _FATAL(message: bytes) -> None:
    os.write(sys.stderr.fileno(), b"MuJoCo: " + message + b"\n")
    os._exit(FATAL_EXIT_CODE)


def _disable_robosuite_logs() -> None:
    """Load robosuite's settings before robosuite, which opens its log file as it is imported."""
    if "robosuite.macros" in sys.modules:
        return
    package = importlib.util.find_spec("robosuite")
    if package is None or not package.submodule_search_locations:
        return  # the import that follows says so
    path = Path(package.submodule_search_locations[0]) / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert spec is not None
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    vars(macros).update(CONSOLE_LOGGING_LEVEL=None, FILE_LOGGING_LEVEL=None)
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
