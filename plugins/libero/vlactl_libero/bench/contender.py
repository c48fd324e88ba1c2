"""A contender's process as the benchmark holds it: asks, weighs, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import psutil

from vlactl.errors import EXIT_CLASSES, EnvironmentNotReadyError, UserError
from vlactl_libero.bench.memory import Memory, weigh
from vlactl_libero.bench.progress import LABELS
from vlactl_libero.bench.workload import Setup

_GRACE_SECONDS = 5.0


class Contender:
    """One side of the benchmark, in a process (and a process group) of its own.

    A context that ends the process: at once where it is left by an error or an interruption.

    Args:
        setup: what it is made of.
        variables: environment variables of its simulators.
    """

    def __init__(self, setup: Setup, variables: Mapping[str, str]) -> None:
        self._name = LABELS[setup.side]
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlactl_libero.bench.contender_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # LIBERO talks
            start_new_session=True,  # Ctrl-C in a terminal is for the command alone
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send(setup)

    def call(self, method: str, *arguments: object) -> Any:
        """Have a method of the side run and return its result.

        Raises:
            UserError: the side raised one.
            EnvironmentNotReadyError: it failed otherwise, or died.
        """
        try:
            self._connection.send((method, arguments))
            kind, answer = self._connection.recv()
        except (EOFError, OSError):
            raise EnvironmentNotReadyError(
                f"the process of the {self._name} simulators died",
                hint="out of memory? try a smaller --num-envs",
            ) from None
        if kind == "user-error":
            exit_code, message, hint = answer
            raise EXIT_CLASSES.get(exit_code, UserError)(message, hint=hint)
        if kind == "error":
            raise EnvironmentNotReadyError(f"the {self._name} simulators failed:\n{answer}")
        return answer

    def memory(self) -> Memory:
        """Of the process and everything that it has started."""
        return weigh(self._members())

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(_GRACE_SECONDS if kind is None else 0.0)

    def _end(self, grace: float) -> None:
        """End the process with everything that it has started."""
        members = self._members()
        with suppress(OSError):
            self._connection.send(None)
            self._connection.poll(grace)  # its end closes when it has left
        # Not waited for yet, so the number of the group cannot belong to anybody else.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()
        self._connection.close()

    def _members(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        return []
