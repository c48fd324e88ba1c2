"""How a directory becomes a checkpoint, while training goes on.

Actors write their shards into `step-N.tmp`; when all of them have succeeded, rank 0, which need not
be an actor, writes the manifest and renames the directory to `step-N`. So a kill at any moment
leaves the newest complete checkpoint as it was. A save that fails anywhere is forgotten everywhere:
its directory goes, older ones stay, and after a few failures in a row the run ends.

In the background, actors copy their state to host memory and a thread writes the copy. The thread
talks to other actors' threads through a process group of its own. It is a daemon: when a peer died
and the process leaves, nobody waits for it. A process that leaves while it runs does so by
`os._exit`: the interpreter's own end, in the middle of torch's code, is SIGABRT instead of the exit
code.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from torch import nn

from vlactl import __version__
from vlactl.config.run import CheckpointConfig
from vlactl.distributed.roles import Ranks, World
from vlactl.errors import IntegrityError
from vlactl.hub.manifest import (
    CHECKPOINTS,
    Description,
    describe_share,
    is_complete,
    list_checkpoints,
    publish,
    resume_point,
    step_name,
    step_of,
    write_manifest,
)
from vlactl.hub.models import readable
from vlactl.report.atomic import write_json
from vlactl.train.agreement import together
from vlactl.train.checkpoint import (
    FORMAT,
    FROZEN,
    State,
    checkpoint_state,
    fingerprints,
    load_verified,
    num_bytes,
    stage,
    verify_together,
    write_shards,
)

LOG = logging.getLogger(__name__)
STATE = "state.json"
RUNNING = "running"
SPACE_FACTOR = 1.2
"""Free space that a save wants, per byte of its tensors."""


class Checkpoints:
    """The checkpoints of a run, on one rank. All methods are called on every rank.

    Args:
        run_dir: of the run.
        module: the policy's; None on ranks that are no actors.
        optimizer: of its trained parameters; None on ranks that are no actors.
        world: the ranks.
        config: how many stay, and how they are written.
        trained_only: leave out parameters that get no gradient.
        command: that goes on with a run, in front of its directory.
    """

    def __init__(
        self,
        run_dir: Path,
        module: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        config: CheckpointConfig,
        *,
        trained_only: bool,
        command: str = "vlactl train --resume",
    ) -> None:
        self._run_dir = run_dir
        self._folder = run_dir / CHECKPOINTS
        self._module = module
        self._optimizer = optimizer
        self._world = world
        self._config = config
        self._trained_only = trained_only
        self._command = command
        self._state: State | None = None
        self._prints: dict[str, str] | None = None
        self._writing: _Writing | None = None
        self._saved_step: int | None = None
        self._failures = 0

    def resume(self) -> int:
        """Load the newest intact checkpoint of the run, if there is one.

        Returns:
            The number of finished steps.

        Raises:
            IntegrityError: there are checkpoints but none is intact, or it is of another model.
        """
        everyone = self._world.everyone
        steps = everyone.gather([step for step, _ in list_checkpoints(self._run_dir)])
        if any(seen != steps[0] for seen in steps):
            raise IntegrityError(
                f"ranks see different checkpoints in {self._run_dir}: after steps {steps}",
                hint="all hosts of a job need the same directory",
            )
        path, skipped = resume_point(self._run_dir, partial(verify_together, ranks=everyone))
        for reason in skipped:
            self._tell(logging.WARNING, f"checkpoint passed over: {reason}")
        if path is None:
            return 0
        self._tell(logging.INFO, f"going on from {path}")
        together(everyone, partial(self._load, path))
        self._saved_step = step_of(path)
        return self._saved_step

    def save(self, step: int, *, status: str = RUNNING, now: bool = False) -> None:
        """Save the state after `step` finished steps; a step that is saved already is not again.

        Waits for the previous one first. Unless `now`, the new one is complete only after a later
        `poll` or `finish`, where the configuration has saving in the background.

        Args:
            step: finished ones.
            status: of the run, for `state.json`.
            now: complete when this returns, or an error: the last one of a process.

        Raises:
            IntegrityError: it failed and was wanted `now`, or too many failed in a row.
        """
        try:
            self.finish()
        except IntegrityError as error:
            if not now:  # else this save decides
                raise
            self._tell(logging.WARNING, error.message)
        if step == self._saved_step:
            return
        in_background = self._config.background and not now
        try:
            self._prepare(step, status, in_background=in_background)
        except IntegrityError as error:
            self._fail(step, error, is_fatal=now)
            return
        finally:
            state, self._state = self._state, None
        self._writing = _Writing(
            step, state, self._temporary(step), self._world.saving, is_fatal=now
        )
        if in_background:
            self._writing.start()
        else:
            self._writing.run()
            self._conclude(self._writing)

    def poll(self) -> None:
        """Complete what was written in the background, once all actors are done; costs little.

        Raises:
            IntegrityError: too many saves failed in a row.
        """
        if self._writing and not self._world.everyone.any(self._writing.is_going_on):
            self._conclude(self._writing)

    def finish(self) -> None:
        """Wait for what is being written and complete it.

        Raises:
            IntegrityError: too many saves failed in a row.
        """
        if self._writing:
            self._writing.wait()
            self._conclude(self._writing)

    def _load(self, directory: Path) -> None:
        if self._module is not None:
            load_verified(directory, self._module, self._optimizer, self._world.actors)

    def _prepare(self, step: int, status: str, *, in_background: bool) -> None:
        """All that can fail before the first shard is written; leaves what is to be written.

        Raises:
            IntegrityError: it failed on some rank.
        """
        size = sum(together(self._world.everyone, self._collect))
        self._on_main(partial(self._make_directory, step, status, int(SPACE_FACTOR * size)))
        if self._module is not None and self._trained_only and self._prints is None:
            self._prints = fingerprints(self._module)
        together(
            self._world.everyone,
            partial(self._stage, self._temporary(step), in_background=in_background),
        )

    def _collect(self) -> int:
        """Find what this rank has to save; returns its size in bytes."""
        if self._module is None:
            return 0
        self._state = checkpoint_state(
            self._module, self._optimizer, trained_only=self._trained_only
        )
        return num_bytes(self._state, self._world.actors.size)

    def _make_directory(self, step: int, status: str, needed: int) -> None:
        """Leave an empty directory, on a disk that has room for so many bytes."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise IntegrityError(
                f"a checkpoint needs {readable(needed)}, and {self._folder} has {readable(free)}"
            )
        self._temporary(step).mkdir()
        write_json(self._temporary(step) / STATE, {"step": step, "status": status})

    def _stage(self, directory: Path, *, in_background: bool) -> None:
        """What actors do before training may change their state."""
        if self._state is None:
            return
        if self._prints is not None and self._world.actors.is_first:
            write_json(directory / FROZEN, self._prints)
        if in_background:
            self._state = stage(self._state, self._world.device)

    def _conclude(self, writing: _Writing) -> None:
        """Complete a checkpoint whose files are written, or forget it."""
        self._writing = None
        try:
            shares = together(self._world.everyone, writing.result)
            described = {name: file for share in shares for name, file in share.items()}
            self._on_main(partial(self._publish, writing.step, described))
        except IntegrityError as error:
            self._fail(writing.step, error, is_fatal=writing.is_fatal)
        else:
            self._failures = 0
            self._saved_step = writing.step

    def _publish(self, step: int, described: Mapping[str, Description]) -> None:
        final = self._folder / step_name(step)
        header = {
            "format": FORMAT,
            "step": step,
            "vlactl": __version__,
            "torch": torch.__version__,
            "actors": self._world.actors.size,
            "trained_only": self._trained_only,
        }
        write_manifest(self._temporary(step), header, described)
        shutil.rmtree(final, ignore_errors=True)  # one that `resume` has passed over
        publish(self._temporary(step), final)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        """Keep the newest complete checkpoints only.

        Those of later steps are what `resume` has passed over: they do not count, however complete
        they look.
        """
        everything = list_checkpoints(self._run_dir)
        complete = [path for step, path in everything if step <= newest and is_complete(path)]
        kept = complete[-self._config.keep :]
        for _, path in everything:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _fail(self, step: int, error: IntegrityError, *, is_fatal: bool) -> None:
        """Forget a save that failed; the same on all ranks."""
        self._failures += 1
        if self._world.is_main:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        text = f"the checkpoint after step {step} could not be saved: {error.message}"
        if is_fatal or self._failures > self._config.max_failures:
            raise IntegrityError(
                f"{text}\n{self._failures} in a row failed; older checkpoints are as they were",
                hint=error.hint
                or f"make room in {self._folder}, then go on: {self._command} {self._run_dir}",
            ) from error
        self._tell(logging.WARNING, f"{text}; training goes on")

    def _on_main(self, action: Callable[[], None]) -> None:
        """Let the main rank act; all ranks fail if it does."""
        together(self._world.everyone, action if self._world.is_main else _nothing)

    def _temporary(self, step: int) -> Path:
        return self._folder / f"{step_name(step)}.tmp"

    def _tell(self, level: int, text: str) -> None:
        if self._world.is_main:
            LOG.log(level, "%s", text)


class _Writing:
    """The files of one checkpoint on their way to the disk; of a rank that is no actor, none."""

    def __init__(
        self, step: int, state: State | None, directory: Path, ranks: Ranks, *, is_fatal: bool
    ) -> None:
        self.step = step
        self.is_fatal = is_fatal
        self._state = state
        self._directory = directory
        self._ranks = ranks
        self._described: dict[str, Description] = {}
        self._error: Exception | None = None
        self._thread = Thread(target=self.run, name=f"save-{step}", daemon=True)

    def start(self) -> None:
        """Write in the background."""
        self._thread.start()

    def run(self) -> None:
        """Write; what goes wrong is raised by `result`."""
        try:
            if self._state is not None:
                write_shards(self._state, self._directory, self._ranks)
                self._described = describe_share(
                    self._directory, self._ranks.index, self._ranks.size
                )
        except Exception as error:
            self._error = error
        finally:
            self._state = None  # a copy of all weights may be large

    @property
    def is_going_on(self) -> bool:
        """Whether the thread is still writing."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Return when the thread is done."""
        self._thread.join()

    def result(self) -> dict[str, Description]:
        """Sizes and hashes of this rank's share of the files."""
        if self._error is not None:
            raise self._error
        return self._described


def _nothing() -> None:
    """What ranks do that only take part in an agreement."""
