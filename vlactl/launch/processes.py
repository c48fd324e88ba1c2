"""Starting a tree of processes and making sure that none of it outlives its job.

Members are recognised by a token in their environment, not by parenthood: a simulator whose worker
was killed belongs to nobody, and torchrun gives every worker a session of its own.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TOKEN_VARIABLE = "VLACTL_JOB"  # noqa: S105 - marks processes, protects nothing
_KILL_SECONDS = 5.0
_KILL_ROUNDS = 4


class ProcessTree:
    """A command and everything that it starts."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._token = uuid.uuid4().hex
        with log.open("ab") as output:
            self._root = subprocess.Popen(
                command,
                env={**os.environ, **variables, TOKEN_VARIABLE: self._token},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )

    def exit_code(self) -> int | None:
        """Of the command itself; None while it runs."""
        return self._root.poll()

    def children(self) -> list[psutil.Process]:
        """Processes that the command itself has started: under torchrun, the workers."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(self._root.pid).children()
        return found

    def end(self, grace: float) -> None:
        """End all members: politely, and after `grace` seconds by force.

        What cannot be killed, because a driver or a disk holds it, is left to the system.
        """
        members = list(self._members())
        for process in members:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        self._wait(members, grace)
        for _ in range(_KILL_ROUNDS):
            members = list(self._members())
            if not members:
                return
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._wait(members, _KILL_SECONDS)

    def _wait(self, members: list[psutil.Process], timeout: float) -> None:
        self._root.poll()
        psutil.wait_procs(members, timeout=timeout)
        self._root.poll()

    def _members(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(TOKEN_VARIABLE) == self._token and is_alive(process):
                    yield process


@contextmanager
def process_tree(
    command: Sequence[str], variables: Mapping[str, str], log: Path, *, grace: float
) -> Iterator[ProcessTree]:
    """A running tree; whatever is left of it when the block ends is ended."""
    tree = ProcessTree(command, variables, log)
    try:
        yield tree
    finally:
        tree.end(grace)


def send_signal(process: psutil.Process, number: int) -> None:
    """Signal a process that may be gone already."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be reaped does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
