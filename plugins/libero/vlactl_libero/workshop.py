"""What the simulators of one process share: compiled tasks and the GL context."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field
from functools import cache, partial

from vlactl_libero.core import FastStage
from vlactl_libero.pictures import Drawable, Studio, View
from vlactl_libero.task_model import TaskModel
from vlactl_libero.tasks import LiberoTask


class Workshop:
    """Compiled tasks, kept for the next episode of the same task.

    Args:
        image_size: height and width of pictures.
        has_pictures: a camera is used, so there is a GL context.
        task_cache: tasks that are kept; those in use are kept in any case.
    """

    def __init__(self, image_size: int, has_pictures: bool, task_cache: int) -> None:
        self._image_size, self._task_cache = image_size, task_cache
        self._studio = Studio() if has_pictures else None
        self._shelf: dict[LiberoTask, _Entry] = {}  # the one left longest ago comes first
        self._lock = threading.Lock()

    def open(self, task: LiberoTask) -> FastStage:
        """A stage for one simulator; the task is compiled unless it is here."""
        with self._lock:
            entry = self._shelf.get(task) or self._add(task)
            entry.users += 1
        try:
            with entry.lock:  # who wants another task does not wait for this one's compilation
                if entry.model is None:
                    entry.model = self._build(entry, task)
            view = View(entry.drawable) if entry.drawable else None
            return FastStage(entry.model, view, on_close=partial(self._leave, task))
        except BaseException:
            self._leave(task)
            raise

    def _leave(self, task: LiberoTask) -> None:
        with self._lock:
            entry = self._shelf[task] = self._shelf.pop(task)
            entry.users -= 1

    def _add(self, task: LiberoTask) -> _Entry:
        self._make_room()
        entry = self._shelf[task] = _Entry()
        return entry

    def _build(self, entry: _Entry, task: LiberoTask) -> TaskModel:
        model = TaskModel(task.bddl_file)
        if self._studio is not None:
            entry.drawable = Drawable(self._studio, model.model, self._image_size)
        return model

    def _make_room(self) -> None:
        unused = [task for task, entry in self._shelf.items() if not entry.users]
        excess = max(0, len(self._shelf) + 1 - self._task_cache)
        for task in unused[:excess]:
            drawable = self._shelf.pop(task).drawable
            if drawable is not None:
                drawable.free()
        if unused and excess:
            gc.collect()  # robosuite's environments contain cycles


@dataclass(slots=True)
class _Entry:
    model: TaskModel | None = None
    drawable: Drawable | None = None
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


workshop = cache(Workshop)
"""The workshop of this process. `SimulatorPool` makes its simulators one after the other."""
