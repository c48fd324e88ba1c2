"""Simulators in processes of their own, behind the slots of an `Environment`.

Every slot is one subprocess that holds one `Simulator`. Requests and answers travel over a socket
pair, pictures through an anonymous memory file that both sides map: it has no name, so nothing is
left behind when a process is killed. A simulator that dies, hangs or returns numbers that are not
finite costs its own episode: the slot reports a failure and gets a new process with its next
`begin`.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from vlactl.api.contracts import ChunkResult, EnvContext, EnvSpec, Episode, SlotEvent
from vlactl.api.plugins import EnvironmentConfig
from vlactl.errors import EXIT_CLASSES, UserError

CameraLayout = dict[str, tuple[int, int]]


def map_pictures(file: int, cameras: CameraLayout) -> dict[str, np.ndarray]:
    """Views uint8 [H, W, 3] into a memory file, one per camera, one after the other."""
    if not cameras:
        return {}
    memory = mmap.mmap(file, picture_bytes(cameras))
    views, offset = {}, 0
    for name, (height, width) in cameras.items():
        flat = np.frombuffer(memory, np.uint8, height * width * 3, offset)
        views[name] = flat.reshape(height, width, 3)
        offset += height * width * 3
    return views


def picture_bytes(cameras: CameraLayout) -> int:
    """Size of one slot's memory file."""
    return sum(height * width * 3 for height, width in cameras.values())


class SimulatorPool:
    """An `Environment` made of simulator subprocesses.

    Args:
        factory: "module:function" called as (config, context) -> Simulator inside each subprocess.
        config: the environment's section; `step_timeout` and `recycle_after` are read here.
        context: number of slots, cameras.
        spec: what the environment offers.
        env: variables added to the environment of the subprocesses.

    Raises:
        UserError: from `wait`, when a simulator reports one: it would only happen again.
    """

    def __init__(
        self,
        factory: str,
        config: EnvironmentConfig,
        context: EnvContext,
        spec: EnvSpec,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = spec
        cameras = {name: spec.cameras[name] for name in context.cameras}
        variables = {**os.environ, **(env or {})}
        self._slots = [
            _Slot(index, (factory, config, context, cameras), variables, config.recycle_after)
            for index in range(context.num_slots)
        ]
        self._timeout = config.step_timeout

    def begin(self, slot: int, episode: Episode) -> None:
        """Start an episode; the process is started first where there is none."""
        self._slots[slot].begin(episode, self._timeout)

    def advance(self, slot: int, actions_KA: np.ndarray) -> None:
        """Send one action chunk."""
        self._slots[slot].request("advance", actions_KA, self._timeout)

    def wait(self, at_least: int, timeout: float) -> list[SlotEvent]:
        """Collect events until there are `at_least`, nothing is under way, or time is up."""
        events: list[SlotEvent] = []
        end = time.monotonic() + timeout
        while len(events) < at_least:
            busy = {slot.connection: slot for slot in self._slots if slot.deadline is not None}
            if not busy:
                break
            deadlines = (slot.deadline for slot in busy.values() if slot.deadline is not None)
            now = time.monotonic()
            answers = wait(list(busy), max(0.0, min(end, *deadlines) - now))
            for connection, slot in busy.items():
                event = slot.receive() if connection in answers else slot.expire(self._timeout)
                if event is not None:
                    events.append(event)
            if time.monotonic() >= end:
                break
        return events

    def close(self) -> None:
        """Ask every simulator to leave, and kill those that do not."""
        for slot in self._slots:
            slot.ask_to_leave()
        for slot in self._slots:
            slot.stop(grace=2.0)

    @property
    def process_ids(self) -> dict[int, int]:
        """Slot -> process id of the simulators that are running."""
        return {s.index: s.process.pid for s in self._slots if s.process is not None}


class _Slot:
    """One subprocess and the state of its conversation."""

    def __init__(
        self,
        index: int,
        build: tuple[str, EnvironmentConfig, EnvContext, CameraLayout],
        variables: Mapping[str, str],
        recycle_after: int,
    ) -> None:
        self.index = index
        self.deadline: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection = _closed_connection()
        self._build, self._variables = build, variables
        self._recycle_after = recycle_after
        self._episodes = 0
        self._sequence = 0
        self._pictures: dict[str, np.ndarray] = {}

    def begin(self, episode: Episode, timeout: float) -> None:
        worn_out = 0 < self._recycle_after <= self._episodes
        if self.process is None or worn_out or self.process.poll() is not None:
            self.stop(grace=2.0)
            self._start()
        self._episodes += 1
        self.request("begin", episode, timeout)

    def request(self, verb: str, argument: Any, timeout: float) -> None:
        self._sequence += 1
        self.deadline = time.monotonic() + timeout
        try:
            self.connection.send((verb, self._sequence, argument))
        except OSError:
            self.deadline = time.monotonic()  # the process has died: `receive` reports it

    def receive(self) -> SlotEvent | None:
        """Read one answer; None for an answer to a request that was given up."""
        try:
            kind, sequence, answer = self.connection.recv()
        except (EOFError, OSError):
            return self._fail(f"simulator process died ({self._exit_text()})")
        if sequence != self._sequence:
            return None
        self.deadline = None
        if kind == "user-error":
            exit_code, message, hint = answer
            raise EXIT_CLASSES.get(exit_code, UserError)(message, hint=hint)
        if kind == "error":
            return self._fail(answer)
        return self._deliver(answer)

    def expire(self, timeout: float) -> SlotEvent | None:
        if self.deadline is None or time.monotonic() < self.deadline:
            return None
        return self._fail(f"no answer within {timeout:g} s")

    def ask_to_leave(self) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                self.connection.send(("close", 0, None))
            except OSError:
                return

    def stop(self, grace: float) -> None:
        """End the process, by force after `grace` seconds."""
        self.deadline = None
        self._pictures = {}
        if self.process is None:
            return
        self.ask_to_leave()
        try:
            self.process.wait(grace if self.process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
        self.process = None

    def _deliver(self, result: ChunkResult) -> SlotEvent:
        broken = _not_finite(result)
        if broken:
            return self._fail(f"simulator returned {broken} that is not finite")
        if result.observation is not None:
            images = {name: view.copy() for name, view in self._pictures.items()}
            result = replace(result, observation=replace(result.observation, images=images))
        return SlotEvent(slot=self.index, result=result)

    def _fail(self, reason: str) -> SlotEvent:
        self.stop(grace=0.0)
        return SlotEvent(slot=self.index, failure=reason)

    def _exit_text(self) -> str:
        if self.process is None:
            return "not started"
        try:
            code = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "connection closed"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        pictures = os.memfd_create("vlactl-pictures")
        cameras = self._build[3]
        os.ftruncate(pictures, max(1, picture_bytes(cameras)))
        command = [sys.executable, "-m", "vlactl.api.simulator_process"]
        descriptors = (theirs.fileno(), pictures)
        self.process = subprocess.Popen(
            [*command, *map(str, (*descriptors, os.getpid()))],
            pass_fds=descriptors,
            env=dict(self._variables),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches the engine only
        )
        theirs.close()
        self._pictures = map_pictures(pictures, cameras)
        os.close(pictures)
        self.connection = Connection(ours.detach())
        self.connection.send(self._build)
        self._episodes = 0


def _closed_connection() -> Connection:
    ours, theirs = socket.socketpair()
    theirs.close()
    connection = Connection(ours.detach())
    connection.close()
    return connection


def _not_finite(result: ChunkResult) -> str:
    if not np.isfinite(result.rewards).all():
        return "a reward"
    if result.observation is not None and not np.isfinite(result.observation.state).all():
        return "a state"
    return ""
