"""What runs in each process of a `SimulatorPool`: `python -m ... SOCKET MEMORY PARENT`.

The main thread reads requests and hands each to the thread of its slot. That thread builds the
slot's simulator, makes every call to it and closes it, so that whatever is bound to a thread (a GL
context, say) stays in the thread that made it. It also answers: pictures are in shared memory
before the answer is sent.

The process leaves on request, or when the other side is gone, even if a simulator is in the middle
of a long call. An exception that a slot's thread cannot answer with ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from vlactl.api.contracts import ChunkResult, Simulator
from vlactl.api.plugins import load_object
from vlactl.api.simulators import Answer, Build, Request, map_pictures
from vlactl.errors import UserError

PR_SET_PDEATHSIG = 1
CLOSE_SECONDS = 1.5
"""For all simulators together, when the process leaves; shorter than the pool's patience."""


def main() -> None:
    """Serve requests until asked to leave."""
    _die_with_parent(int(sys.argv[3]))
    connection = Connection(int(sys.argv[1]))
    build: Build = connection.recv()
    pictures = map_pictures(int(sys.argv[2]), build.cameras, build.slots)
    host = _Host(build, connection)
    servers = {slot: _SlotServer(slot, pictures[slot], host) for slot in build.slots}
    while (request := _next_request(connection)) is not None:
        servers[request.slot].requests.put(request)
    for server in servers.values():
        server.requests.put(None)
    end = time.monotonic() + CLOSE_SECONDS
    for server in servers.values():
        server.thread.join(max(0.0, end - time.monotonic()))


class _Host:
    """What the threads of all slots share."""

    def __init__(self, build: Build, connection: Connection) -> None:
        self._build, self._connection = build, connection
        self._building, self._sending = threading.Lock(), threading.Lock()

    def make_simulator(self) -> Simulator:
        # One at a time: neither imports nor drivers take kindly to a first use by several threads.
        with self._building:
            factory = load_object(self._build.factory)
            simulator: Simulator = factory(self._build.config, self._build.context)
            return simulator

    def send(self, answer: Answer) -> None:
        with self._sending:
            self._connection.send(answer)


class _SlotServer:
    """The thread of one slot, and its simulator."""

    def __init__(self, slot: int, pictures: dict[str, np.ndarray], host: _Host) -> None:
        self.requests: SimpleQueue[Request | None] = SimpleQueue()
        self._pictures, self._host = pictures, host
        self._simulator: Simulator | None = None
        self.thread = threading.Thread(target=self._run, name=f"slot {slot}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while (request := self.requests.get()) is not None:
                kind, content = self._answer(request)
                self._host.send(Answer(request.slot, request.sequence, kind, content))
            self._close_simulator()
        except BaseException:  # SystemExit, too: a slot without its thread would seem to hang
            traceback.print_exc()
            _exit(1)

    def _answer(self, request: Request) -> tuple[str, Any]:
        try:
            return "result", self._serve(request.verb, request.argument)
        except UserError as error:
            return "user-error", (error.exit_code, error.message, error.hint)
        except Exception as error:
            return self._recover(error)

    def _serve(self, verb: str, argument: Any) -> ChunkResult:
        if self._simulator is None:
            self._simulator = self._host.make_simulator()
        if verb == "begin":
            return self._publish(self._simulator.begin(argument))
        return self._publish(self._simulator.advance(argument))

    def _publish(self, result: ChunkResult) -> ChunkResult:
        """Check the numbers, and move the pictures of an observation into shared memory."""
        _check_finite(result)
        if result.observation is None:
            return result
        for name, view in self._pictures.items():
            picture = result.observation.images[name]
            if picture.dtype != view.dtype or picture.shape != view.shape:
                found = f"{picture.dtype} {picture.shape}"
                raise ValueError(f"picture {name} is {found}, wanted {view.dtype} {view.shape}")
            view[:] = picture
        return replace(result, observation=replace(result.observation, images={}))

    def _recover(self, error: Exception) -> tuple[str, str]:
        """Give up the simulator; the next request builds a new one."""
        text = str(error) if isinstance(error, _NotFiniteError) else _format(error)
        try:
            self._close_simulator()
        except Exception as second:
            return "fatal", f"{_format(second)}\nwhile closing the simulator after:\n\n{text}"
        return "error", text

    def _close_simulator(self) -> None:
        simulator, self._simulator = self._simulator, None
        if simulator is not None:
            simulator.close()


class _NotFiniteError(ValueError):
    """Its message says it all: where it was raised does not matter."""


def _check_finite(result: ChunkResult) -> None:
    if not np.isfinite(result.rewards).all():
        raise _NotFiniteError("simulator returned a reward that is not finite")
    if result.observation is not None and not np.isfinite(result.observation.state).all():
        raise _NotFiniteError("simulator returned a state that is not finite")


def _format(error: Exception) -> str:
    return "".join(traceback.format_exception(error))


def _next_request(connection: Connection) -> Request | None:
    try:
        request: Request | None = connection.recv()
    except (EOFError, OSError):
        return None
    return request


def _die_with_parent(parent: int) -> None:
    """Leave when the engine's process is killed, also in the middle of a long step (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _exit(code: int) -> None:
    """Leave without atexit handlers.

    Drivers of off-screen renderers print tracebacks from theirs: harmless, but they look like
    failures. Threads that are busy are not waited for either.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
    _exit(0)
