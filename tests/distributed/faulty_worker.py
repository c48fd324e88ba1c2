"""The real worker, with a fault injected: `FAULTS="rank:phase:step:action,..."`, each once.

A fault strikes when the rank says that it is in the phase of the step. After `torchft`'s event
injector.
"""

import os
import signal
import sys
from pathlib import Path

from vlactl.launch.status import Heartbeat
from vlactl.worker import main

beat = Heartbeat.beat


def faulty_beat(self: Heartbeat, phase: str, step: int, done: int = 0, total: int = 0) -> None:
    beat(self, phase, step, done, total)
    rank = int(os.environ["RANK"])
    for fault in os.environ["FAULTS"].split(","):
        place, _, action = fault.rpartition(":")
        mark = Path(os.environ["FAULT_MARKS"]) / fault.replace(":", "-")
        if place == f"{rank}:{phase}:{step}" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), getattr(signal, action))


Heartbeat.beat = faulty_beat

if __name__ == "__main__":
    sys.exit(main())
