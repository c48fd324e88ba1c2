"""What runs in each process of a `SimulatorPool`: `python -m ... SOCKET MEMORY PARENT`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from vlactl.api.contracts import ChunkResult, Simulator
from vlactl.api.plugins import load_object
from vlactl.api.simulators import map_pictures
from vlactl.errors import UserError

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until the other side closes the connection."""
    _die_with_parent(int(sys.argv[3]))
    connection = Connection(int(sys.argv[1]))
    factory, config, context, cameras = connection.recv()
    pictures = map_pictures(int(sys.argv[2]), cameras)
    simulator: Simulator | None = None
    while (request := _next_request(connection)) is not None:
        verb, sequence, argument = request
        try:
            if simulator is None:
                simulator = load_object(factory)(config, context)
            result = simulator.begin(argument) if verb == "begin" else simulator.advance(argument)
            answer: tuple[str, Any] = ("result", _publish(result, pictures))
        except UserError as error:
            answer = ("user-error", (error.exit_code, error.message, error.hint))
        except Exception:
            answer = ("error", traceback.format_exc())
        connection.send((answer[0], sequence, answer[1]))
    if simulator is not None:
        simulator.close()


def _next_request(connection: Connection) -> tuple[str, int, Any] | None:
    try:
        request: tuple[str, int, Any] = connection.recv()
    except EOFError:
        return None
    return None if request[0] == "close" else request


def _publish(result: ChunkResult, pictures: dict[str, np.ndarray]) -> ChunkResult:
    """Move the pictures of an observation into shared memory."""
    if result.observation is None:
        return result
    for name, view in pictures.items():
        picture = result.observation.images[name]
        if picture.dtype != view.dtype or picture.shape != view.shape:
            found = f"{picture.dtype} {picture.shape}"
            raise ValueError(f"picture {name} is {found}, wanted {view.dtype} {view.shape}")
        view[:] = picture
    return replace(result, observation=replace(result.observation, images={}))


def _die_with_parent(parent: int) -> None:
    """Leave when the engine's process is killed, also in the middle of a long step (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


if __name__ == "__main__":
    main()
    # Drivers of off-screen renderers print tracebacks from their atexit handlers (harmless, but
    # they look like failures): leave without running them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
