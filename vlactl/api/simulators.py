"""Simulators in subprocesses, behind the slots of an `Environment`.

A process hosts the simulators of a block of slots, each in a thread of its own; unless an
environment asks for fewer processes, a block is one slot. Requests and answers travel over one
socket pair per process, pictures through an anonymous memory file that both sides map: it has no
name, so nothing is left behind when a process is killed.

A simulator that raises or returns numbers that are not finite is replaced within its process and
costs its own episode. A process that dies, or is killed because a simulator hangs, costs the
episodes of its slots: each of them reports that in answer to its request, and enters a new process
with its next `begin`. A process that has served its time takes no new episodes: its slots enter
its successor one by one as they begin, and the last one to leave closes it.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from vlactl.api.contracts import ChunkResult, EnvContext, EnvSpec, Episode, SlotEvent
from vlactl.api.plugins import EnvironmentConfig
from vlactl.errors import EXIT_CLASSES, UserError

LEAVE_SECONDS = 2.0
"""After which a process that was asked to leave is killed."""

CameraLayout = dict[str, tuple[int, int]]


class Build(NamedTuple):
    """What a process is told first: the simulators that it hosts."""

    factory: str
    config: EnvironmentConfig
    context: EnvContext
    cameras: CameraLayout
    slots: tuple[int, ...]


class Request(NamedTuple):
    """What a slot is to do; None in its place asks the process to leave."""

    slot: int
    sequence: int
    verb: str
    argument: Any


class Answer(NamedTuple):
    """What became of a request.

    `kind` is "result" (content: ChunkResult without pictures), "user-error" (exit code, message
    and hint), "error" (text; the simulator is gone) or "fatal" (text; the process is unfit, too).
    """

    slot: int
    sequence: int
    kind: str
    content: Any


def map_pictures(
    file: int, cameras: CameraLayout, slots: Sequence[int]
) -> dict[int, dict[str, np.ndarray]]:
    """Views uint8 [H, W, 3] into a memory file, per slot and camera, one after the other."""
    if not cameras:
        return {slot: {} for slot in slots}
    memory = mmap.mmap(file, picture_bytes(cameras) * len(slots))
    offset = 0
    views: dict[int, dict[str, np.ndarray]] = {slot: {} for slot in slots}
    for slot in slots:
        for name, (height, width) in cameras.items():
            flat = np.frombuffer(memory, np.uint8, height * width * 3, offset)
            views[slot][name] = flat.reshape(height, width, 3)
            offset += height * width * 3
    return views


def picture_bytes(cameras: CameraLayout) -> int:
    """Size of one slot's part of a memory file."""
    return sum(height * width * 3 for height, width in cameras.values())


class SimulatorPool:
    """An `Environment` made of simulator subprocesses.

    Args:
        factory: "module:function" called as (config, context) -> Simulator for each slot, in the
            subprocess and in the thread that makes all calls to this simulator.
        config: the environment's section; `step_timeout` and `recycle_after` are read here. A
            process is renewed after `recycle_after` episodes per slot that it hosts.
        context: number of slots, cameras.
        spec: what the environment offers.
        env: variables added to the environment of the subprocesses.
        num_processes: processes that share the slots, in contiguous blocks of nearly equal size;
            None = one per slot, for simulators that do not go with threads.

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
        num_processes: int | None = None,
    ) -> None:
        self.spec = spec
        cameras = {name: spec.cameras[name] for name in context.cameras}
        variables = {**os.environ, **(env or {})}
        self._timeout = config.step_timeout
        self._slots: list[_Slot] = []
        self._leaving: list[_Process] = []
        num_blocks = context.num_slots if num_processes is None else num_processes
        for indices in _deal(context.num_slots, num_blocks):
            build = Build(factory, config, context, cameras, indices)
            block = _Block(build, variables, config.recycle_after * len(indices))
            self._slots += [_Slot(index, block) for index in indices]

    def begin(self, slot: int, episode: Episode) -> None:
        """Start an episode; the process is started first where there is none."""
        player = self._slots[slot]
        process = player.block.open_process()
        if player.process is not process:
            self._leave(player)
            process.members.add(player)
            player.process = process
        process.num_begun += 1
        self._request(player, "begin", episode)

    def advance(self, slot: int, actions_KA: np.ndarray) -> None:
        """Send one action chunk."""
        self._request(self._slots[slot], "advance", actions_KA)

    def wait(self, at_least: int, timeout: float) -> list[SlotEvent]:
        """Collect events until there are `at_least`, nothing is under way, or time is up."""
        end = time.monotonic() + timeout
        self._leaving = [process for process in self._leaving if not process.has_left()]
        events = self._lost_episodes()
        while len(events) < at_least:
            busy = [slot for slot in self._slots if slot.deadline is not None]
            processes = {s.process.connection: s.process for s in busy if s.process is not None}
            if not processes:
                break
            wake_up = min(end, *(slot.deadline for slot in busy if slot.deadline is not None))
            answering = wait(list(processes), max(0.0, wake_up - time.monotonic()))
            for connection, process in processes.items():
                if connection in answering:
                    events += self._receive(process)
            self._expire()
            events += self._lost_episodes()
            if time.monotonic() >= end:
                break
        return events

    def close(self) -> None:
        """Ask every simulator to leave, and kill those that do not."""
        for slot in self._slots:
            slot.deadline = None
            self._leave(slot)
        for process in self._leaving:
            process.await_leave()
        self._leaving = []

    @property
    def process_ids(self) -> dict[int, int]:
        """Slot -> id of the process that hosts its simulator, for slots that have one."""
        return {s.index: s.process.popen.pid for s in self._slots if s.process is not None}

    def _request(self, slot: _Slot, verb: str, argument: Any) -> None:
        slot.sequence += 1
        slot.deadline = time.monotonic() + self._timeout
        if slot.process is not None:
            slot.process.send(Request(slot.index, slot.sequence, verb, argument))

    def _receive(self, process: _Process) -> list[SlotEvent]:
        """Read all answers that have arrived; results nobody waits for any more are ignored."""
        events = []
        while not process.connection.closed and process.connection.poll():
            try:
                answer: Answer = process.connection.recv()
            except (EOFError, OSError):
                self._lose(process, f"simulator process died ({process.exit_text()})")
                break
            slot = self._slots[answer.slot]
            if answer.sequence == slot.sequence:
                slot.deadline = None
                events.append(self._interpret(answer, process))
            if answer.kind == "fatal":
                self._lose(process, _ended_by(slot.index, "could not close its simulator"))
        return events

    def _interpret(self, answer: Answer, process: _Process) -> SlotEvent:
        if answer.kind == "user-error":
            exit_code, message, hint = answer.content
            raise EXIT_CLASSES.get(exit_code, UserError)(message, hint=hint)
        if answer.kind != "result":
            return SlotEvent(slot=answer.slot, failure=answer.content)
        result: ChunkResult = answer.content
        if result.observation is not None:
            views = process.pictures[answer.slot]
            images = {name: view.copy() for name, view in views.items()}
            result = replace(result, observation=replace(result.observation, images=images))
        return SlotEvent(slot=answer.slot, result=result)

    def _expire(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.process is not None and slot.deadline is not None and now >= slot.deadline:
                reason = f"no answer within {self._timeout:g} s"
                self._lose(slot.process, _ended_by(slot.index, f"gave {reason}"))
                slot.lost = reason

    def _lose(self, process: _Process, reason: str) -> None:
        process.kill()
        for slot in process.members:
            slot.process = None
            slot.lost = reason
        process.members.clear()

    def _lost_episodes(self) -> list[SlotEvent]:
        """Failures of the slots that wait for an answer and have lost their process."""
        lost = [s for s in self._slots if s.deadline is not None and s.process is None]
        for slot in lost:
            slot.deadline = None
        return [SlotEvent(slot=slot.index, failure=slot.lost) for slot in lost]

    def _leave(self, slot: _Slot) -> None:
        process, slot.process = slot.process, None
        if process is None:
            return
        process.members.remove(slot)
        if not process.members:
            process.ask_to_leave()
            self._leaving.append(process)


@dataclass(slots=True, eq=False)
class _Slot:
    """Where a slot's simulator is, and what is awaited of it."""

    index: int
    block: _Block
    process: _Process | None = None
    sequence: int = 0
    """Number of the newest request; only the answer to this one counts."""
    deadline: float | None = None
    """Of the answer that is awaited; None = none is."""
    lost: str = "no episode has begun"
    """Why there is no process."""


@dataclass(slots=True)
class _Block:
    """Slots that share processes, and the process that takes their new episodes."""

    build: Build
    variables: Mapping[str, str]
    max_episodes: int
    """That a process takes; 0 = any number."""
    newest: _Process | None = None

    def open_process(self) -> _Process:
        if self.newest is None or self.newest.has_ended() or self._is_worn_out(self.newest):
            self.newest = _start(self.build, self.variables)
        return self.newest

    def _is_worn_out(self, process: _Process) -> bool:
        return 0 < self.max_episodes <= process.num_begun


@dataclass(slots=True, eq=False)
class _Process:
    """One subprocess, our end of its connection, and its pictures by slot and camera."""

    popen: subprocess.Popen[bytes]
    connection: Connection
    pictures: dict[int, dict[str, np.ndarray]]
    members: set[_Slot] = field(default_factory=set)
    """Slots whose simulators are here."""
    num_begun: int = 0
    """Episodes."""
    leave_by: float = 0.0

    def send(self, message: Build | Request | None) -> None:
        with suppress(OSError):  # it has died: whoever awaits an answer reads the connection's end
            self.connection.send(message)

    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def exit_text(self) -> str:
        try:
            code = self.popen.wait(1.0)
        except subprocess.TimeoutExpired:
            return "connection closed"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def ask_to_leave(self) -> None:
        self.leave_by = time.monotonic() + LEAVE_SECONDS
        self.send(None)

    def has_left(self) -> bool:
        """It was asked to leave, and is gone or has just been killed for not leaving."""
        if not self.has_ended() and time.monotonic() < self.leave_by:
            return False
        self.kill()
        return True

    def await_leave(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(max(0.0, self.leave_by - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.connection.close()


def _start(build: Build, variables: Mapping[str, str]) -> _Process:
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("vlactl-pictures")
    os.ftruncate(memory, max(1, picture_bytes(build.cameras) * len(build.slots)))
    command = [sys.executable, "-m", "vlactl.api.simulator_process"]
    descriptors = (theirs.fileno(), memory)
    popen = subprocess.Popen(
        [*command, *map(str, (*descriptors, os.getpid()))],
        pass_fds=descriptors,
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal reaches the engine only
    )
    theirs.close()
    pictures = map_pictures(memory, build.cameras, build.slots)
    os.close(memory)
    process = _Process(popen, Connection(ours.detach()), pictures)
    process.send(build)
    return process


def _deal(num_slots: int, num_blocks: int) -> list[tuple[int, ...]]:
    """Contiguous blocks of nearly equal size, none of them empty."""
    num_blocks = min(num_blocks, num_slots)
    bounds = [block * num_slots // num_blocks for block in range(num_blocks + 1)]
    return [tuple(range(*ends)) for ends in pairwise(bounds)]


def _ended_by(slot: int, deed: str) -> str:
    return f"simulator process was ended: slot {slot} {deed}"
