"""What runs in a contender's process: `python -m ... SOCKET`.

Serves (method, arguments) requests until the other side closes the connection.
"""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, Protocol

from vlactl.api.plugins import load_object
from vlactl.errors import UserError
from vlactl_libero.bench.workload import Seen, Setup

SIDES = {
    "stock": "vlactl_libero.bench.lockstep:LockStep",
    "ours": "vlactl_libero.bench.slots:Slots",
}


class Side(Protocol):
    """What both contenders can be asked to do; built from a `Setup`."""

    def reset(self, trial: int) -> float:
        """Begin this initial state everywhere, let it settle and observe; returns seconds."""

    def check(self) -> list[Seen | None]:
        """Play the first `CHECK_STEPS` random actions after a reset; None = solved by them."""

    def run(self, seconds: float) -> tuple[int, float]:
        """Play random actions for a while; returns control steps of all, and seconds."""

    def close(self) -> None:
        """Free all simulators."""


def main() -> None:
    """Build the contender with the first request, and serve."""
    connection = Connection(int(sys.argv[1]))
    # Simulators that are forked off must not hold the socket: its end tells that this process died.
    os.register_at_fork(after_in_child=connection.close)
    setup: Setup = connection.recv()
    side: Side | None = None
    try:
        while (request := _next_request(connection)) is not None:
            method, arguments = request
            try:
                side = side or load_object(SIDES[setup.side])(setup)
                answer: tuple[str, Any] = ("result", getattr(side, method)(*arguments))
            except UserError as error:
                answer = ("user-error", (error.exit_code, error.message, error.hint))
            except Exception:
                answer = ("error", traceback.format_exc())
            connection.send(answer)
    finally:
        if side is not None:
            side.close()


def _next_request(connection: Connection) -> tuple[str, tuple[Any, ...]] | None:
    try:
        request: tuple[str, tuple[Any, ...]] | None = connection.recv()
    except EOFError:
        return None
    return request


if __name__ == "__main__":
    main()
    # As in simulator processes: graphics drivers complain in their atexit handlers.
    os._exit(0)
