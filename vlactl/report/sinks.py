"""The metrics of a run: `metrics.jsonl` is the record, sinks are mirrors of it.

The record is written first, one line of strict JSON per call. A sink may fail (no network, no
login, a full disk elsewhere): it is warned about once, by name, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlactl.api.contracts import Sink
from vlactl.api.plugins import Descriptor
from vlactl.api.registry import find, load_factory
from vlactl.errors import IntegrityError
from vlactl.report.atomic import atomic_path

FILE_NAME = "metrics.jsonl"

LOG = logging.getLogger(__name__)


class MetricsLog:
    """Appends to `metrics.jsonl` and mirrors to sinks.

    Args:
        run_dir: where the file is.
        sinks: names of sink plugins; one that cannot be built is warned about and left out.

    Raises:
        ConfigError: there is no sink of that name.
    """

    def __init__(self, run_dir: Path, sinks: Iterable[str]) -> None:
        self.path = run_dir / FILE_NAME
        self._sinks: dict[str, Sink] = {}
        self._failed: set[str] = set()
        for name in sinks:
            self._open(find("sink", name), run_dir)

    def resume_from(self, step: int) -> None:
        """Forget lines of `step` and later, and a line that a crash cut: `step` is logged next."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_path(self.path) as temporary:
            kept = "".join(line for line in lines if _is_before(line, step))
            temporary.write_text(kept, encoding="utf-8")

    def read(self) -> list[dict[str, Any]]:
        """All lines, the oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step. Several calls for one step add lines."""
        values = {name: _json_number(value) for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | values, allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        for name, sink in self._sinks.items():
            try:
                sink.log(step, metrics)
            except Exception as error:
                self._warn_once(name, error)

    def close(self) -> None:
        """Close all sinks."""
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as error:
                self._warn_once(name, error)

    def _open(self, plugin: Descriptor, run_dir: Path) -> None:
        try:
            config = plugin.config(name=plugin.name)
            self._sinks[plugin.name] = load_factory(plugin)(config, run_dir)
        except Exception as error:
            self._warn_once(plugin.name, error)

    def _warn_once(self, name: str, error: Exception) -> None:
        if name in self._failed:
            return
        self._failed.add(name)
        kind = type(error).__name__
        LOG.warning('sink "%s" failed and the run goes on without it: %s: %s', name, kind, error)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's record; one that is being written is left out.

    Raises:
        IntegrityError: a line is not what `MetricsLog` writes.
    """
    path = run_dir / FILE_NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [_with_step(json.loads(line)) for line in lines]
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error


def _with_step(line: dict[str, Any]) -> dict[str, Any]:
    return line | {"step": int(line["step"]), "time": float(line["time"])}


def _json_number(value: float) -> float | None:
    """JSON has no NaN and no infinity: both become null."""
    return value if math.isfinite(value) else None


def _is_before(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] < step
    except json.JSONDecodeError:
        return False
