"""What sinks of tracking services share: who a run is, the same after every resumption.

The id is drawn once and kept in the run directory, which may be moved. A copy of the directory is
the same run for these services; delete `tracking.json` in it to make it another.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlactl.errors import IntegrityError
from vlactl.report.atomic import write_json

PROJECT = "vlactl"
"""Where runs are gathered, unless an environment variable of the service names another project."""
_FILE, _CONFIG = "tracking.json", "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A run's id (16 hexadecimal digits), its name for people, and its configuration."""

    id: str
    name: str
    config: dict[str, Any]


def identify(run_dir: Path) -> Identity:
    """The identity of a run, which gets one if it has none.

    Raises:
        IntegrityError: a file of the run is damaged.
    """
    path = run_dir / _FILE
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:16]})
    place = run_dir.resolve()
    config = _read(run_dir / _CONFIG) if (run_dir / _CONFIG).exists() else {}
    return Identity(
        id=str(_read(path)["id"]), name=f"{place.parent.name}-{place.name}", config=config
    )


class RunSink:
    """Metrics by step, for a library whose runs have `log(dict, step=)` and `finish()`.

    Of steps that a resumed run plays again, some services keep the first.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of a step to the library, which sends or writes them meanwhile."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send or write what is left."""
        self._run.finish()


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    return value
